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
echo 'PHASE: run command 1 of 2'
sh -c 'echo "it'\''s" $HOME' || { echo "E: run command 1 failed with status $?"; exit 1; }
echo 'PHASE: run command 2 of 2'
sh -c 'make
install' || { echo "E: run command 2 failed with status $?"; exit 1; }
