#!/bin/sh
# Make a base image from the Debian mirror this machine's apt uses, for places where no image registry is reachable.
#
#   sudo sh deploy/local_base.sh                      # makes omni-base:local
#   BASE_IMAGE=omni-base:local docker-compose build
#
# Needs root, debootstrap and a running Docker engine. The machine's certificate authorities go into the image, because
# a mirror that is reached through an inspecting gateway is trusted by them only; so the image stays on this machine.
set -eu

image=${1:-omni-base:local}
suite=${SUITE:-bookworm}
packages=python3,python3-venv,ca-certificates
authorities=/etc/ssl/certs/ca-certificates.crt

command -v debootstrap >/dev/null || { echo "error: debootstrap is not installed (apt-get install debootstrap)" >&2; exit 1; }
docker info >/dev/null 2>&1 || { echo "error: no Docker engine answers" >&2; exit 1; }

mirror=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' "Codename: $suite" "Created-By: Packages" | head -n 1)}
[ -n "$mirror" ] || { echo "error: apt knows no mirror of $suite; set MIRROR" >&2; exit 1; }

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include="$packages" "$suite" "$root" "$mirror"
chroot "$root" apt-get clean
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/log/*.log "$root"/debootstrap
cp "$authorities" "$root$authorities"
# As in the official Debian images: apt's caches would only make layers larger.
echo 'Dir::Cache::pkgcache ""; Dir::Cache::srcpkgcache "";' > "$root/etc/apt/apt.conf.d/docker-clean"

tar --numeric-owner -C "$root" -c . | docker import \
    --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
    --change 'ENV LANG=C.UTF-8' \
    --change "ENV SSL_CERT_FILE=$authorities" \
    --change "ENV PIP_CERT=$authorities" \
    --change 'CMD ["python3"]' \
    - "$image"
