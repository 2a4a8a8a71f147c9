#!/usr/bin/env bash
# OV-DQUO in the toy world, without a network, in ten minutes on two cores after `make demo`: a DETR
# that learned the boxes of seven things finds ten; then it finds objects that no label names, and
# learns from them. These are the commands that you would type; with real data they are the same,
# without the @presets. What is over plain CLIP runs beside it, on the other core.
set -euo pipefail
cd "$(dirname "$0")/.."

run() { printf '\n$ python %s\n' "$*"; python "$@"; }
beside() { printf '\n$ python %s &\n' "$*"; python "$@" >> "$out/clip.txt" 2>&1 & }

# 1. The scenes and the nano DeCLIP, unless `make demo` has made them.
[ -f data/toy/train/instances.json ] || run -m toy.world --dev 0
[ -f out/toy/declip/declip.safetensors ] || run train.py @presets/toy.txt
export OMP_NUM_THREADS=1

# 2. Detectors on plain CLIP and on DeCLIP. They never see a circle, a square or a triangle.
novel="circle, square, triangle" out=out/toy/ov_dquo
rm -rf $out/clip-0 $out/declip-0 $out/clip+unknown-0 $out/declip+unknown-0
mkdir -p $out
beside -m downstream.ov_dquo.train @presets/toy_ov_dquo.txt --novel "$novel" \
    --backbone none --attention clip --out $out/clip-0
run -m downstream.ov_dquo.train @presets/toy_ov_dquo.txt --novel "$novel" \
    --backbone out/toy/declip/declip.safetensors --out $out/declip-0
wait

# 3. What it takes for objects though no label names them; with that, the same again.
run -m downstream.ov_dquo.unknown @presets/toy_unknown.txt --out $out/unknown-0.json \
    --ckpt $out/declip-0/ov_dquo.safetensors
beside -m downstream.ov_dquo.train @presets/toy_ov_dquo.txt --novel "$novel" \
    --backbone none --attention clip --unknown $out/unknown-0.json --out $out/clip+unknown-0
run -m downstream.ov_dquo.train @presets/toy_ov_dquo.txt --novel "$novel" \
    --backbone out/toy/declip/declip.safetensors --unknown $out/unknown-0.json \
    --out $out/declip+unknown-0
wait

# 4. Average precision of all four, and a picture; novel classes have an asterisk.
for arm in clip declip clip+unknown declip+unknown; do
    run -m downstream.ov_dquo.eval @presets/toy_ov_dquo_eval.txt \
        --ckpt $out/$arm-0/ov_dquo.safetensors
done
run -m tools.detect data/toy/val/images/00008.png --temperature 15 --nms 0.3 --least 0.2 \
    --out out/toy --ckpt $out/declip+unknown-0/ov_dquo.safetensors
