#!/usr/bin/env bash
# Installs what the build (and with `test`, the tests) need and is missing, and no more.
# Everything of ours lands in folders of this checkout that git ignores; only system packages
# go elsewhere, by apt when root, else the line to run is printed.
set -euo pipefail
cd "$(dirname "$0")/.."
want=${1:-build}

TORCH=2.11.0
CUDA_CPU_SET=("nvidia-cuda-runtime==13.0.*" "nvidia-cuda-cupti==13.0.*" "nvidia-cuda-crt==13.0.*")
TENSORBOARD=2.20.0
RUST_MIN=1.89

die() { printf 'error: %s\n' "$1" >&2; shift; for hint in "$@"; do printf '  hint: %s\n' "$hint" >&2; done; exit 69; }
say() { printf 'set-up: %s\n' "$*"; }
version_ge() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n1)" = "$2" ]; }

# --- Rust -----------------------------------------------------------------------------------------
command -v cargo >/dev/null || die "cargo is not installed" "install Rust $RUST_MIN or later, see https://rustup.rs"
rust=$(cargo --version | cut -d' ' -f2)
version_ge "$rust" "$RUST_MIN" || die "cargo is $rust; Rust $RUST_MIN or later is needed" \
  "the distribution's package is too old here: install the current Rust, see https://rustup.rs (Debian 13 and Ubuntu 24.04 have the package rustup; then: rustup default stable)"

# --- system packages --------------------------------------------------------------------------------
missing=()
need() { # need PACKAGE COMMAND...: PACKAGE unless the command succeeds
  local package=$1; shift
  "$@" >/dev/null 2>&1 || missing+=("$package")
}
need g++ command -v g++
need cmake command -v cmake
need nasm command -v nasm
need pkg-config command -v pkg-config
for lib in avformat avcodec avutil swscale; do need "lib$lib-dev" pkg-config --exists "lib$lib"; done
if [ -z "${LIBTORCH:-}" ] || [ "$want" = test ]; then need python3-venv python3 -c 'import venv, ensurepip'; fi
if [ "$want" = test ]; then
  # The launcher's test of an unmodified PyTorch script needs any Python that has torch.
  need python3-torch sh -c '"${TSM_PYTHON:-/usr/bin/python3}" -c "import importlib.util as u, sys; sys.exit(u.find_spec(\"torch\") is None)"'
  need ffmpeg command -v ffmpeg
  # A SLURM cluster, an MPI, an ssh server and network namespaces, to start the launcher by.
  need slurm-wlm sh -c 'PATH=$PATH:/usr/sbin; command -v srun && command -v slurmctld && command -v slurmd'
  need munge sh -c 'PATH=$PATH:/usr/sbin; command -v munged'
  need openmpi-bin command -v mpirun
  need libopenmpi-dev command -v mpicc
  need libclang-dev sh -c 'ls /usr/lib*/llvm-*/lib/clang/*/include/stddef.h /usr/lib*/clang/*/include/stddef.h 2>/dev/null | grep -q .'
  need openssh-server sh -c 'PATH=$PATH:/usr/sbin; command -v sshd'
  need openssh-client command -v ssh
  need iproute2 sh -c 'PATH=$PATH:/usr/sbin:/sbin; command -v ip'
fi
if [ ${#missing[@]} -gt 0 ]; then
  line="apt-get install -y --no-install-recommends ${missing[*]}"
  command -v apt-get >/dev/null || die "missing: ${missing[*]}" "install the packages that have these names on Debian"
  [ "$(id -u)" = 0 ] || die "missing system packages: ${missing[*]}" "run: sudo $line"
  say "$line"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  $line -qq >/dev/null
fi

# A link would be emptied, and what it leads to with it.
for folder in .torch-venv .test-venv; do
  [ ! -L $folder ] || die "$folder is a link" "remove it: the set-up makes a folder of its own"
done

# --- libtorch ---------------------------------------------------------------------------------------
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }
torch_version() { # of the libtorch in folder $1
  if [ -f "$1/version.py" ]; then sed -n "s/^__version__ = '\([0-9.]*\).*/\1/p" "$1/version.py"
  elif [ -f "$1/build-version" ]; then sed 's/[^0-9.].*//' "$1/build-version"; fi
}
check_torch() {
  [ -f "$1/lib/libtorch_cpu.so" ] || return 1
  [ "$(torch_version "$1")" = "$TORCH" ]
}
if [ -n "${LIBTORCH:-}" ]; then
  check_torch "$LIBTORCH" || die "LIBTORCH is \"$LIBTORCH\", which holds no libtorch $TORCH (found: \"$(torch_version "$LIBTORCH")\")" \
    "name a folder that has lib/libtorch_cpu.so of version $TORCH, or unset LIBTORCH and let the set-up fetch it"
  say "libtorch $TORCH of $LIBTORCH"
else
  set_name=cpu
  if has_gpu || [ "${TSM_CUDA:-}" = 1 ]; then set_name=cuda; fi
  stamp=.torch-venv/tsm-set
  if ! { [ "$(cat $stamp 2>/dev/null)" = "$TORCH $set_name $PWD" ] && check_torch .libtorch; }; then
    say "libtorch $TORCH ($set_name set) into .torch-venv: $([ $set_name = cuda ] && echo '5.2 GB on disk' || echo 'a download of 0.54 GB, 1.3 GB on disk')"
    python3 -m venv --clear .torch-venv
    pip=(.torch-venv/bin/python -m pip install -q --disable-pip-version-check)
    if [ $set_name = cuda ]; then
      "${pip[@]}" "torch==$TORCH" "nvidia-cuda-crt==13.0.*"
    else
      # What libtorch_cpu.so itself needs, and the headers of the CUDA plugin.
      "${pip[@]}" --no-deps "torch==$TORCH" "${CUDA_CPU_SET[@]}"
    fi
    ln -sfn "$(.torch-venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch" .libtorch
    check_torch .libtorch || die "the torch wheel was installed, but .libtorch holds no libtorch $TORCH"
    printf '%s' "$TORCH $set_name $PWD" > $stamp
  fi
fi

# --- tests only: TensorBoard's own reader -------------------------------------------------------------
if [ "$want" = test ] && [ "$(cat .test-venv/tsm-set 2>/dev/null)" != "tensorboard $TENSORBOARD $PWD" ]; then
  say "tensorboard $TENSORBOARD into .test-venv, for the tests that read event files back"
  python3 -m venv --clear .test-venv
  .test-venv/bin/python -m pip install -q --disable-pip-version-check "tensorboard==$TENSORBOARD" "setuptools<81"
  printf '%s' "tensorboard $TENSORBOARD $PWD" > .test-venv/tsm-set
fi
