#!/bin/sh
# Writes phasewise_pb2.py, phasewise_pb2.pyi and phasewise_pb2_grpc.py from phasewise.proto.
#
# Stubs refuse a protobuf or grpcio older than their generator, so the oldest generator that we support is used, in a
# throw-away environment: what it writes runs with protobuf 6.31 and later and grpcio 1.76 and later.
set -eu
cd "$(dirname "$0")/../.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"${PYTHON:-python3}" -m venv "$environment"
"$environment/bin/pip" install --quiet --disable-pip-version-check "grpcio-tools==1.76.0"
"$environment/bin/python" -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. \
    phasewise/rpc/phasewise.proto
