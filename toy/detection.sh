#!/usr/bin/env bash
# Open-vocabulary detection in the toy world, without a network: a detector that learned the boxes
# of seven things finds ten, in five minutes of one core after `make demo`. These are the commands
# that you would type; with real data they are the same, without the @presets.
set -euo pipefail
cd "$(dirname "$0")/.."

run() { printf '\n$ python %s\n' "$*"; python "$@"; }

# 1. The scenes and the nano DeCLIP, unless `make demo` has made them.
[ -f data/toy/train/instances.json ] || run -m toy.world --dev 0
[ -f out/toy/declip/declip.safetensors ] || run train.py @presets/toy.txt

# 2. A detector on plain CLIP. It never sees a circle, a square or a triangle.
novel="circle, square, triangle"
rm -rf out/toy/detection/clip-0 out/toy/detection/declip-0
run -m downstream.fvit.train @presets/toy_fvit_train.txt --novel "$novel" \
    --backbone none --attention clip --out out/toy/detection/clip-0
run -m downstream.fvit.eval @presets/toy_fvit_eval.txt \
    --ckpt out/toy/detection/clip-0/fvit.safetensors

# 3. The same on DeCLIP.
run -m downstream.fvit.train @presets/toy_fvit_train.txt --novel "$novel" \
    --backbone out/toy/declip/declip.safetensors --out out/toy/detection/declip-0
run -m downstream.fvit.eval @presets/toy_fvit_eval.txt \
    --ckpt out/toy/detection/declip-0/fvit.safetensors

# 4. A picture; novel classes have an asterisk. Three splits in one table:
#    python -m tools.reproduce --world toy --tables detection
run -m tools.detect data/toy/val/images/00003.png --temperature 15 --nms 0.3 --out out/toy \
    --ckpt out/toy/detection/declip-0/fvit.safetensors
