#!/usr/bin/env bash
# Make .venv and install mura_dist into it, from requirements.lock: every version is pinned, every archive checked by its SHA-256.
#   bash launch/setup.sh [EXTRAS]      EXTRAS: train (default), or several: train,dev  or, to predict alone: cpu,page
# Needs Python 3.11 or newer (PYTHON=... names another one) and the network; does nothing when nothing changed.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-train}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "launch/setup.sh: $python is $("$python" --version 2>&1), Python 3.11 or newer is needed; name one: PYTHON=python3.12 bash launch/setup.sh" >&2
  exit 2
}
# ONNX Runtime for CPUs (cpu) and that for GPUs (cuda, and train with it) fill the same folder: one environment, one of the two.
will_hold() { # will_hold EXTRA,... DISTRIBUTION
  [[ ",$extras," =~ ,(${1//,/|}), ]] || compgen -G ".venv/lib/python3*/site-packages/$2-[0-9]*.dist-info" > /dev/null
}
if will_hold cpu onnxruntime && will_hold cuda,train onnxruntime_gpu; then
  echo "launch/setup.sh: $extras: ONNX Runtime for CPUs (cpu) cannot stand beside that for GPUs (cuda, train) in .venv; name one of them, and remove .venv if it holds the other" >&2
  exit 2
fi
# The stamp says which extras were installed from which files: written last, so an install that was cut short is done again.
stamp=.venv/installed
digest=$(cat pyproject.toml requirements.lock | sha256sum | cut -d' ' -f1)
{ read -r before present < "$stamp"; } 2>/dev/null || true
[ "${before:-}" = "$digest" ] || present=
missing=
for extra in ${extras//,/ }; do
  [[ ",${present:-}," == *",$extra,"* ]] || missing=1
done
name_missing_runtime() {
  will_hold cpu onnxruntime || will_hold cuda,train onnxruntime_gpu || echo "launch/setup.sh: predict and page need ONNX Runtime too: bash launch/setup.sh cpu (or bash launch/setup.sh cuda for an NVIDIA GPU)" >&2
}
if [ -z "$missing" ]; then
  name_missing_runtime
  exit 0
fi

locked=$("$python" launch/locked.py "${present:+$present,}$extras")
if [ ! -x .venv/bin/python ]; then
  "$python" -m venv .venv || {
    rm -rf .venv
    echo "launch/setup.sh: $python cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2
    exit 1
  }
fi

about() { # about EXTRA: what it brings, why, and how much space that takes beside the base
  case $1 in
    cpu) echo "ONNX Runtime for processors, which predicts: 0.1 GB" ;;
    cuda) echo "ONNX Runtime for NVIDIA GPUs and every CUDA library it opens: 2.5 GB" ;;
    train) echo "torch, DeepSpeed and DALI with NVIDIA's CUDA libraries: 7.2 GB, on a CPU too, because torch's own libraries are linked against them" ;;
    page) echo "Streamlit and what it needs, the web page: 0.3 GB" ;;
    parquet) echo "pyarrow, tables as Parquet: 0.2 GB" ;;
    openvino) echo "OpenVINO, another runtime for processors: 0.2 GB" ;;
    remote) echo "fsspec and s3fs, folders on s3://: 0.1 GB" ;;
    dev) echo "what the tests need: 0.9 GB" ;;
    docs) echo "mkdocs and its theme, the documentation's site: 0.1 GB" ;;
    mlflow) echo "the client of an MLflow server: 0.1 GB" ;;
  esac
}
echo "installing into .venv, every archive checked by its SHA-256:"
echo "  base: NumPy, pandas, Pillow, pydicom, which read radiographs: 0.3 GB"
for extra in ${extras//,/ }; do
  [[ ",${present:-}," == *",$extra,"* ]] || echo "  $extra: $(about "$extra")"
done
quietly=--quiet
if [ -t 1 ] && [ -t 2 ]; then quietly=; fi # a terminal shows pip's own progress
install() { .venv/bin/python -m pip install ${quietly:+"$quietly"} --disable-pip-version-check --no-deps "$@"; }
# What builds a wheel comes first. For a build environment of its own pip would fetch packages that no hash was checked of.
install --require-hashes --requirement <("$python" launch/locked.py build)
install --require-hashes --no-build-isolation --requirement <(echo "$locked")
install --no-build-isolation --editable .
echo "$digest ${present:+$present,}$extras" > "$stamp"
name_missing_runtime
