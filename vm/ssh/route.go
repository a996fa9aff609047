package ssh

import (
	"fmt"
	"net"
	"strconv"

	gossh "golang.org/x/crypto/ssh"
)

// Channel types and requests of RFC 4254 and OpenSSH's PROTOCOL.
const (
	sessionChannel           = "session"
	directTCPIP              = "direct-tcpip"
	directStreamlocal        = "direct-streamlocal@openssh.com"
	forwardedTCPIP           = "forwarded-tcpip"
	forwardedStreamlocal     = "forwarded-streamlocal@openssh.com"
	authAgent                = "auth-agent@openssh.com"
	tcpipForward             = "tcpip-forward"
	cancelTCPIPForward       = "cancel-tcpip-forward"
	streamlocalForward       = "streamlocal-forward@openssh.com"
	cancelStreamlocalForward = "cancel-streamlocal-forward@openssh.com"
	noMoreSessions           = "no-more-sessions@openssh.com"
)

// listenMsg is the payload of tcpip-forward, RFC 4254 section 7.1.
type listenMsg struct {
	Addr string
	Port uint32
}

// openedMsg is that of forwarded-tcpip and direct-tcpip, section 7.2.
type openedMsg struct {
	Addr       string
	Port       uint32
	OriginAddr string
	OriginPort uint32
}

// routable lists what the guest may open when somebody asked for it.
func routable(channelType string) bool {
	return channelType == forwardedTCPIP || channelType == forwardedStreamlocal || channelType == authAgent
}

// routeKey names the route of a channel that the guest opens.
func routeKey(channelType string, extra []byte) string {
	switch channelType {
	case forwardedTCPIP:
		var m openedMsg
		if gossh.Unmarshal(extra, &m) == nil {
			return tcpKey(m.Addr, m.Port)
		}
	case forwardedStreamlocal:
		var m struct{ Path, Reserved string }
		if gossh.Unmarshal(extra, &m) == nil {
			return forwardedStreamlocal + " " + m.Path
		}
	case authAgent:
		return authAgent
	}
	return ""
}

func tcpKey(addr string, port uint32) string {
	return forwardedTCPIP + " " + net.JoinHostPort(addr, strconv.FormatUint(uint64(port), 10))
}

// forward is a listener in the guest.
type forward struct {
	key    string
	cancel string // global request that ends it
	msg    []byte // its payload
}

// listen asks the guest for a listener, with the request's own payload, and
// routes what arrives there. reply is the guest's answer, as is.
func (c *Client) listen(request string, payload []byte, route func(gossh.NewChannel)) (f forward, reply []byte, err error) {
	c.routeMu.Lock()
	defer c.routeMu.Unlock()
	ok, reply, err := c.conn.SendRequest(request, true, payload)
	if err != nil {
		return forward{}, nil, c.connectionError(err)
	}
	if !ok {
		return forward{}, reply, fmt.Errorf("the guest refuses %s", request)
	}
	if f, err = newForward(request, payload, reply); err != nil {
		return forward{}, reply, err
	}
	c.routes[f.key] = route
	return f, reply, nil
}

// newForward works out under which name the guest will announce connections:
// for port 0, the port is in its reply.
func newForward(request string, payload, reply []byte) (forward, error) {
	switch request {
	case tcpipForward:
		var m listenMsg
		if err := gossh.Unmarshal(payload, &m); err != nil {
			return forward{}, err
		}
		if m.Port == 0 {
			var bound struct{ Port uint32 }
			if err := gossh.Unmarshal(reply, &bound); err != nil {
				return forward{}, err
			}
			m.Port = bound.Port
		}
		return forward{tcpKey(m.Addr, m.Port), cancelTCPIPForward, gossh.Marshal(&m)}, nil
	case streamlocalForward:
		var m struct{ Path string }
		if err := gossh.Unmarshal(payload, &m); err != nil {
			return forward{}, err
		}
		return forward{forwardedStreamlocal + " " + m.Path, cancelStreamlocalForward, gossh.Marshal(&m)}, nil
	}
	return forward{}, fmt.Errorf("unknown forward request %s", request)
}

// unlisten ends a listener. The guest's answer does not matter: without its
// route, nothing that it opens is accepted.
func (c *Client) unlisten(f forward) {
	c.unroute(f.key)
	c.conn.SendRequest(f.cancel, false, f.msg)
}

func (c *Client) route(key string, to func(gossh.NewChannel)) {
	c.routeMu.Lock()
	defer c.routeMu.Unlock()
	c.routes[key] = to
}

func (c *Client) unroute(key string) {
	c.routeMu.Lock()
	defer c.routeMu.Unlock()
	delete(c.routes, key)
}
