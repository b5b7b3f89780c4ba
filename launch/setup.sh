#!/usr/bin/env bash
# Create .venv and install mura_dist into it from requirements.lock. Every version is pinned, every archive checked by its SHA-256.
#   bash launch/setup.sh [EXTRAS]      EXTRAS: train (default), several (train,dev), or to predict only: cpu,page
# Needs Python 3.11 or newer (PYTHON=... selects one) and the network. Does nothing if nothing changed.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-train}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "launch/setup.sh: Python is too old: $python is $("$python" --version 2>&1) (3.11 or newer). Select another: PYTHON=python3.12 bash launch/setup.sh" >&2
  exit 2
}
# ONNX Runtime for CPUs (cpu) and for GPUs (cuda, also in train) fill the same folder. An environment holds one of them.
will_hold() { # will_hold EXTRA,... DISTRIBUTION
  [[ ",$extras," =~ ,(${1//,/|}), ]] || compgen -G ".venv/lib/python3*/site-packages/$2-[0-9]*.dist-info" > /dev/null
}
if will_hold cpu onnxruntime && will_hold cuda,train onnxruntime_gpu; then
  echo "launch/setup.sh: $extras: ONNX Runtime for CPUs (cpu) cannot be installed beside that for GPUs (cuda, train) in .venv. Name one of them, and remove .venv if it holds the other." >&2
  exit 2
fi
# The stamp records which extras were installed from which files. It is written last, so an interrupted install is repeated.
stamp=.venv/installed
digest=$(cat pyproject.toml requirements.lock | sha256sum | cut -d' ' -f1)
{ read -r before present < "$stamp"; } 2>/dev/null || true
[ "${before:-}" = "$digest" ] || present=
missing=
for extra in ${extras//,/ }; do
  [[ ",${present:-}," == *",$extra,"* ]] || missing=1
done
name_missing_runtime() {
  will_hold cpu onnxruntime || will_hold cuda,train onnxruntime_gpu || echo "launch/setup.sh: ONNX Runtime is missing, predict and page need it. Run bash launch/setup.sh cpu (or cuda for an NVIDIA GPU)." >&2
}
if [ -z "$missing" ]; then
  name_missing_runtime
  exit 0
fi

locked=$("$python" launch/locked.py "${present:+$present,}$extras")
if [ ! -x .venv/bin/python ]; then
  "$python" -m venv .venv || {
    rm -rf .venv
    echo "launch/setup.sh: $python cannot create a virtual environment. On Debian run apt-get install python3-venv." >&2
    exit 1
  }
fi

about() { # about EXTRA: what it installs, and how much space that takes in addition to the base
  case $1 in
    cpu) echo "ONNX Runtime for CPUs, to predict: 0.1 GB" ;;
    cuda) echo "ONNX Runtime for NVIDIA GPUs and every CUDA library it opens: 2.5 GB" ;;
    train) echo "torch, DeepSpeed and DALI with NVIDIA's CUDA libraries: 7.2 GB, also on a CPU, because torch's libraries are linked against them" ;;
    page) echo "Streamlit, for the web page: 0.3 GB" ;;
    parquet) echo "pyarrow, for tables as Parquet: 0.2 GB" ;;
    openvino) echo "OpenVINO, another runtime for CPUs: 0.2 GB" ;;
    remote) echo "fsspec and s3fs, for folders on s3://: 0.1 GB" ;;
    dev) echo "the tests' requirements: 0.9 GB" ;;
    docs) echo "mkdocs and its theme, for the documentation site: 0.1 GB" ;;
    peers) echo "LitData and SPDL, other loaders for bench pipeline; LitData with torch: 3.5 GB" ;;
    mlflow) echo "the client of an MLflow server: 0.1 GB" ;;
  esac
}
echo "installing into .venv, every archive checked by its SHA-256:"
echo "  base: NumPy, pandas, Pillow and pydicom, to read radiographs: 0.3 GB"
for extra in ${extras//,/ }; do
  [[ ",${present:-}," == *",$extra,"* ]] || echo "  $extra: $(about "$extra")"
done
quietly=--quiet
if [ -t 1 ] && [ -t 2 ]; then quietly=; fi # a terminal shows pip's own progress
install() { .venv/bin/python -m pip install ${quietly:+"$quietly"} --disable-pip-version-check --no-deps "$@"; }
# The build requirements come first. With build isolation pip would download packages without checking a hash.
install --require-hashes --requirement <("$python" launch/locked.py build)
install --require-hashes --no-build-isolation --requirement <(echo "$locked")
install --no-build-isolation --editable .
echo "$digest ${present:+$present,}$extras" > "$stamp"
name_missing_runtime
