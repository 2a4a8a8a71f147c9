#!/usr/bin/env bash
# Trained open-vocabulary segmentation in the toy world, without a network: CAT-Seg learns from the
# labels of twelve classes and names eighteen. These are the commands that you would type; with real
# data they are the same, without the @presets. Four minutes on two cores after `make demo`.
set -euo pipefail
cd "$(dirname "$0")/.."

out=out/toy/catseg
run() { printf '\n$ python %s\n' "$*"; python "$@"; }
beside() { printf '\n$ python %s &\n' "$*"; python "$@" >> "$out/clip.txt" 2>&1 & }

# 1. The nano DeCLIP, unless `make demo` has trained it, and labelled scenes to train with.
[ -d data/toy/train ] && [ -d data/toy/val ] || run -m toy.world --dev 0
[ -d data/toy/labelled ] || run -m toy.world --train 0 --dev 0 --val 0 --labelled 512
[ -f out/toy/declip/declip.safetensors ] || run train.py @presets/toy.txt

# 2. CAT-Seg over plain CLIP and, on the other core, over DeCLIP. They never see the label of a
#    triangle, a cross, an arrow, a checker, a plain ground or a grid.
export OMP_NUM_THREADS=1
rm -rf $out/clip-0 $out/declip-0
mkdir -p $out
beside -m downstream.catseg.train @presets/catseg_toy.txt --out $out/clip-0 \
    --model local-dir:toy/clip --pretrained own --attention catseg
run -m downstream.catseg.train @presets/catseg_toy.txt --out $out/declip-0 \
    --ckpt out/toy/declip/declip.safetensors
wait

# 3. Intersection over union of both.
for arm in clip declip; do
    run -m downstream.catseg.eval @presets/catseg_toy_eval.txt --ckpt $out/$arm-0/catseg.safetensors
done

# 4. A picture. Seen and unseen classes in one table, beside CLIP and DeCLIP without CAT-Seg:
#    python -m tools.reproduce --world toy --tables catseg
run -m tools.segment data/toy/val/images/00005.png --out out/toy \
    --classes "arrow, triangle, checker, noise, grid" --ckpt $out/declip-0/catseg.safetensors
