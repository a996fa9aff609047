set -eu
umask 022
cd /
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/run/build/home LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive
export SSL_CERT_FILE=/run/build/ca.pem
export NODE_EXTRA_CA_CERTS=/run/build/ca.pem
export CURL_CA_BUNDLE=/run/build/ca.pem
export REQUESTS_CA_BUNDLE=/run/build/ca.pem
export PIP_CERT=/run/build/ca.pem
export GIT_SSL_CAINFO=/run/build/ca.pem
export https_proxy='http://user:it'\''s@proxy.example:3128'
mkdir -p "$HOME"
echo 'PHASE: install Node.js and npm'
tar -xzf /run/build/node.tgz --no-same-owner -C /usr/local --strip-components=1 package/bin
chmod 755 /usr/local/bin/node
mkdir -p /usr/local/bin /usr/local/lib/node_modules/npm
tar -xzf /run/build/npm.tgz --no-same-owner -C /usr/local/lib/node_modules/npm --strip-components=1
rm -rf /usr/local/lib/node_modules/npm/man /usr/local/lib/node_modules/npm/docs
for tool in npm npx; do
	chmod 755 "/usr/local/lib/node_modules/npm/bin/$tool-cli.js"
	ln -sf "../lib/node_modules/npm/bin/$tool-cli.js" "/usr/local/bin/$tool"
done
echo 'PHASE: install npm packages'
export NPM_CONFIG_USERCONFIG=/run/build/npmrc NPM_CONFIG_GLOBALCONFIG=/run/build/no-npmrc
export NPM_CONFIG_CACHE=/run/build/npm-cache NPM_CONFIG_LOGS_MAX=0 NPM_CONFIG_PREFIX=/usr/local
export NPM_CONFIG_AUDIT=false NPM_CONFIG_FUND=false NPM_CONFIG_UPDATE_NOTIFIER=false
npm install --global --ignore-scripts --loglevel=http @scope/agent@1.2.3 other@4.5.6
rm /run/build/npmrc
npm rebuild --global --ignore-scripts=false --foreground-scripts @scope/agent
npm ls --global --all --json >/run/build/npm-ls.json || true
unset NPM_CONFIG_USERCONFIG NPM_CONFIG_GLOBALCONFIG NPM_CONFIG_LOGS_MAX NPM_CONFIG_PREFIX
