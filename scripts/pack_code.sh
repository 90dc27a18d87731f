#!/usr/bin/env bash
# Packs this checkout as it stands on the disk (what git tracks or does not ignore) and other files into a tar file:
#
#   scripts/pack_code.sh TARGET.tar.gz [FILE ...]
#
# A FILE lies at the top of the checkout afterwards, under its own name: a config or data from elsewhere.
set -euo pipefail

target=$(realpath "$1")
shift
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/code"
for file in "$@"; do
    cp -R "$file" "$scratch/code/"
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
git ls-files -z --cached --others --exclude-standard --deduplicate |
    while IFS= read -r -d '' file; do
        if [[ -e $file || -L $file ]]; then printf '%s\0' "$file"; fi
    done |
    tar --null --no-recursion -T - -cf - | tar -xf - -C "$scratch/code"
tar -czf "$target" -C "$scratch/code" .
