#!/usr/bin/env bash
# Certificates for one cluster: an authority, and a key that it signs, shared by scheduler, workers and whoever may use them.
#   certificates.sh FOLDER
# It writes FOLDER/dask.yaml too: with DASK_CONFIG=FOLDER/dask.yaml, every part of Dask and every command of crfrefine uses them.
set -euo pipefail
umask 077
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$folder"
openssl req -x509 -newkey rsa:2048 -nodes -days 365 -subj "/CN=crfrefine cluster authority" -keyout ca.key -out ca.pem 2> /dev/null
openssl req -newkey rsa:2048 -nodes -subj "/CN=crfrefine cluster" -keyout key.pem -out request.pem 2> /dev/null
openssl x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 365 -out cert.pem 2> /dev/null
rm -f request.pem ca.srl
cat > dask.yaml <<END
distributed:
  comm:
    require-encryption: true
    tls:
      ca-file: $folder/ca.pem
      scheduler: {cert: $folder/cert.pem, key: $folder/key.pem}
      worker: {cert: $folder/cert.pem, key: $folder/key.pem}
      client: {cert: $folder/cert.pem, key: $folder/key.pem}
END
