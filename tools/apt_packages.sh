#!/bin/sh
# What a bare Debian or Ubuntu needs for the PDF, and Chromium for the checks.
# The HTML book and the tests need none of these.
set -eu
export DEBIAN_FRONTEND=noninteractive
browser=chromium
. /etc/os-release
# Ubuntu's chromium package only points at a snap; its runners bring Chrome.
[ "${ID:-}" = ubuntu ] && browser=
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends \
  texlive-luatex texlive-xetex texlive-latex-extra \
  texlive-latex-recommended texlive-fonts-recommended \
  texlive-plain-generic latexmk lmodern tex-gyre xindy fonts-dejavu \
  fonts-texgyre fonts-texgyre-math fonts-noto-cjk fonts-noto-core \
  fonts-symbola fontconfig poppler-utils make $browser
