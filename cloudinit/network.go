package cloudinit

// Network is the guest's one network card. The zero value leaves it to
// cloud-init, which then asks for a lease on the first card.
type Network struct {
	MAC     string   // which card
	DHCP4   bool     // ask for a lease; the fields below are then not used
	Address string   // CIDR, for example 192.168.127.2/24
	Gateway string   // IPv4 address
	DNS     []string // IPv4 addresses
}

// NetworkConfig is cloud-init's network configuration, version 2:
// https://docs.cloud-init.io/en/latest/reference/network-config-format-v2.html
type NetworkConfig struct {
	Version   int                 `yaml:"version"`
	Ethernets map[string]Ethernet `yaml:"ethernets"`
}

// Ethernet is one card of a NetworkConfig.
type Ethernet struct {
	Match       Match        `yaml:"match"`
	SetName     string       `yaml:"set-name"`
	DHCP4       bool         `yaml:"dhcp4"`
	Addresses   []string     `yaml:"addresses,omitempty"`
	Routes      []Route      `yaml:"routes,omitempty"`
	Nameservers *Nameservers `yaml:"nameservers,omitempty"`
}

// Match picks a card by its hardware address.
type Match struct {
	MACAddress string `yaml:"macaddress"`
}

// Route is a static route.
type Route struct {
	To  string `yaml:"to"`
	Via string `yaml:"via"`
}

// Nameservers are the resolvers that a card brings.
type Nameservers struct {
	Addresses []string `yaml:"addresses"`
}

// nicName is the card's name in the guest. It has to be set: cloud-init's
// networkd renderer matches by the entry's name as well as by its address.
const nicName = "eth0"

func (n Network) config() *NetworkConfig {
	if n.MAC == "" && !n.DHCP4 && n.Address == "" {
		return nil
	}
	e := Ethernet{Match: Match{MACAddress: n.MAC}, SetName: nicName, DHCP4: n.DHCP4}
	if !n.DHCP4 {
		e.Addresses = []string{n.Address}
		if n.Gateway != "" {
			e.Routes = []Route{{To: "0.0.0.0/0", Via: n.Gateway}}
		}
		if len(n.DNS) > 0 {
			e.Nameservers = &Nameservers{Addresses: n.DNS}
		}
	}
	return &NetworkConfig{Version: 2, Ethernets: map[string]Ethernet{nicName: e}}
}
