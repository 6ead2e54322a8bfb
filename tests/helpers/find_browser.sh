#!/bin/sh
# Makes sure, where it can, that there is a Chromium with its driver for the test of the page of `tune`. Never fails: without them, the test is skipped.
there() {
  command -v chromedriver >/dev/null 2>&1 || return 1
  for name in chromium chromium-browser google-chrome google-chrome-stable; do
    command -v "$name" >/dev/null 2>&1 && return 0
  done
  return 1
}

install() {
  DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install --yes --quiet --no-install-recommends chromium chromium-driver >/dev/null 2>&1
}

there && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "no Chromium with chromedriver here: installing Debian's, for the test of the page of tune"
  install || { timeout 120 apt-get update --quiet >/dev/null 2>&1 && install; }
fi
there || echo "no Chromium with chromedriver here: the test of the page of tune in a browser will be skipped"
exit 0
