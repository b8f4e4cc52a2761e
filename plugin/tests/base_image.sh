#!/usr/bin/env bash
# Makes a local stand-in for the image python:3.11-slim-bookworm from Debian's packages, where nothing can be pulled.
# It takes this machine's package sources, certificates and pip settings along: for tests only, never publish it.
set -eu -o pipefail
tag=${1:-python:3.11-slim-bookworm}

options=(--quiet --variant=minbase --mode=root)
options+=(--include=python3,python3-pip,python3-venv,ca-certificates)
options+=(--aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Languages "none"')
for folder in man doc locale; do
    options+=(--dpkgopt="path-exclude=/usr/share/$folder/*")
done
# `python` and a pip that installs into the system, as in the real image.
options+=(--customize-hook='ln -s python3 "$1/usr/bin/python"; rm "$1"/usr/lib/python3.*/EXTERNALLY-MANAGED')
for file in /etc/ssl/certs/ca-certificates.crt /etc/pip.conf; do
    if [ -e "$file" ]; then options+=(--customize-hook="upload $file $file"); fi
done
# Debian 12's own list of package sources where there is one; it stays out of the image.
sources=()
if grep -q '^VERSION_CODENAME=bookworm' /etc/os-release; then
    for file in /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list; do
        if [ -s "$file" ]; then sources+=("$file") && break; fi
    done
fi
options+=(--customize-hook='rm -f "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/*')

mmdebstrap "${options[@]}" bookworm - "${sources[@]}" | docker import \
    --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8' \
    --change 'CMD ["python3"]' - "$tag"
