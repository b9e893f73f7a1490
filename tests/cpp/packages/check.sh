#!/bin/sh
# Installs the two libraries of this folder in every way that users and distributions have, and builds a program with
# them by CMake and by pkg-config. Usage: check.sh FOLDER CMAKE CXX; FOLDER is emptied.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
folder=$1 cmake=$2 CXX=$3
export CXX
rm -rf "$folder"
mkdir -p "$folder"

# configure NAME options...
configure() {
  name=$1
  shift
  "$cmake" -S "$here" -B "$folder/$name/build" -DCMAKE_INSTALL_PREFIX="$folder/$name/configured" "$@" >"$folder/log"
  "$cmake" --build "$folder/$name/build" >"$folder/log"
}

# use NAME PREFIX LIBDIR: a program against what lies at PREFIX, its packages at LIBDIR.
use() {
  echo "$1: $2"
  "$cmake" -S "$here/user" -B "$folder/$1/user" -DCMAKE_PREFIX_PATH="$2" -Dsecond_DIR="$3/cmake/second" >"$folder/log"
  "$cmake" --build "$folder/$1/user" >"$folder/log"
  "$folder/$1/user/user"
  flags=$(PKG_CONFIG_PATH="$3/pkgconfig" pkg-config --cflags --libs second)
  # shellcheck disable=SC2086
  "$CXX" "$here/user/main.cc" -o "$folder/$1/by-pkg-config" $flags
  "$folder/$1/by-pkg-config"
  case "$flags" in *configured*) test -d "$folder/$1/configured" ;; esac
}

trap 'cat "$folder/log"' EXIT

configure prefix -DCMAKE_INSTALL_LIBDIR=lib
"$cmake" --install "$folder/prefix/build" >"$folder/log"
use prefix "$folder/prefix/configured" "$folder/prefix/configured/lib"

configure chosen-later -DCMAKE_INSTALL_LIBDIR=lib/of/this-machine -DCMAKE_INSTALL_INCLUDEDIR=headers
"$cmake" --install "$folder/chosen-later/build" --prefix "$folder/chosen-later/a" >"$folder/log"
use chosen-later "$folder/chosen-later/a" "$folder/chosen-later/a/lib/of/this-machine"

configure staged -DCMAKE_INSTALL_LIBDIR=lib
DESTDIR="$folder/staged/root" "$cmake" --install "$folder/staged/build" --prefix /usr >"$folder/log"
use staged "$folder/staged/root/usr" "$folder/staged/root/usr/lib"

configure moved -DCMAKE_INSTALL_LIBDIR=lib
"$cmake" --install "$folder/moved/build" >"$folder/log"
mv "$folder/moved/configured" "$folder/moved/elsewhere"
use moved "$folder/moved/elsewhere" "$folder/moved/elsewhere/lib"

# Absolute directories below the prefix move with it.
configure absolute -DCMAKE_INSTALL_LIBDIR="$folder/absolute/configured/lib64" \
  -DCMAKE_INSTALL_INCLUDEDIR="$folder/absolute/configured/headers"
"$cmake" --install "$folder/absolute/build" --prefix "$folder/absolute/a" >"$folder/log"
use absolute "$folder/absolute/a" "$folder/absolute/a/lib64"

# Others stay where they are.
configure outside -DCMAKE_INSTALL_LIBDIR="$folder/outside/libraries" -DCMAKE_INSTALL_INCLUDEDIR="$folder/outside/headers"
"$cmake" --install "$folder/outside/build" >"$folder/log"
use outside "$folder/outside/configured" "$folder/outside/libraries"
configure split -DCMAKE_INSTALL_LIBDIR="$folder/split/libraries"
"$cmake" --install "$folder/split/build" >"$folder/log"
use split "$folder/split/configured" "$folder/split/libraries"

trap - EXIT
