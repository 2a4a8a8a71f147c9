#!/usr/bin/env bash
# The whole method in the toy world, in about two minutes on two cores, without a network. These are
# the commands that you would type; with real data they are the same, without the @presets.
set -euo pipefail
cd "$(dirname "$0")/.."

run() { printf '\n$ python %s\n' "$*"; python "$@"; }

# 1. Scenes: 1,024 images without labels to train with, 200 with labels to evaluate with.
run -m toy.world --dev 0

# 2. Plain CLIP: its dense features name neither regions nor pixels.
run eval_region.py @presets/toy_region.txt --out out/toy --attention clip
run eval_seg.py @presets/toy_seg.txt --out out/toy --attention clip

# 3. The decoupled block, untrained.
run eval_region.py @presets/toy_region.txt --out out/toy --attention q
run eval_seg.py @presets/toy_seg.txt --out out/toy --attention q

# 4. DeCLIP: the block learns content from CLIP's [CLS] of crops, and context from the vision
#    foundation model.
rm -rf out/toy/declip
run train.py @presets/toy.txt --out out/toy/declip

# 5. The same evaluations. What was trained, and how, is read from the checkpoint.
run eval_region.py @presets/toy_region.txt --ckpt out/toy/declip/declip.safetensors
run eval_seg.py @presets/toy_seg.txt --ckpt out/toy/declip/declip.safetensors

# 6. One table and one figure.
run -m toy.demo
