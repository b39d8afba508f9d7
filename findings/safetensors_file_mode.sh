#!/usr/bin/env bash
# A file that safetensors 0.8.0 writes under a umask of 022.
# Expected: mode 644, as of any file that a program opens, and as the versions before wrote it. Seen: 600, whatever the
# umask says. A server under another user cannot read the weights of a model that was saved so.
# Exits with 1 where that is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
umask 022
write='import numpy, os, safetensors, safetensors.numpy as s, sys
s.save_file({"a": numpy.zeros(3)}, sys.argv[1])
print("safetensors", safetensors.__version__, "writes with mode", oct(os.stat(sys.argv[1]).st_mode & 0o777))'
for version in 0.7.0 0.8.0; do
    "$folder/venv/bin/python" -m pip install -q --disable-pip-version-check "safetensors==$version" numpy
    "$folder/venv/bin/python" -c "$write" "$folder/$version.safetensors"
done
[[ "$(stat -c %a "$folder/0.7.0.safetensors")" == 644 && "$(stat -c %a "$folder/0.8.0.safetensors")" == 600 ]]
