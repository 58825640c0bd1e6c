"""Encode and decode speed through the public classes; the same script runs for potluck and for hivemind.

Needs nothing but the two packages' common API: `compress(tensor, info)` and `extract(message)`.
"""

import argparse
import importlib
import time

import torch

import common

NAMES = {
    "none": "NoCompression",
    "float16": "Float16Compression",
    "scaled16": "ScaledFloat16Compression",
    "uniform8": "Uniform8BitQuantization",
    "quantile8": "Quantile8BitQuantization",
    "blockwise8": "BlockwiseQuantization",
    "bfloat16": "BFloat16Compression",
    "blockwise4": "Blockwise4BitQuantization",
}


def main():
    args = common.options(argparse.ArgumentParser())
    module = importlib.import_module(f"{args.system}.compression")
    tensor = torch.randn(args.numel, generator=torch.Generator().manual_seed(1))
    info = module.CompressionInfo.from_tensor(tensor)
    target = torch.empty_like(tensor)
    common.opened()
    common.say(ready=True, address="none")
    while (word := common.hear()) != "stop":
        if word == "memcpy":
            start = time.perf_counter()
            target.copy_(tensor)
            common.say(ok=True, encode=time.perf_counter() - start, decode=0.0, error=0.0)
            continue
        try:
            codec = getattr(module, NAMES[word])()
            start = time.perf_counter()
            message = codec.compress(tensor, info)
            middle = time.perf_counter()
            restored = codec.extract(message)
            end = time.perf_counter()
        except Exception as error:  # a system that cannot do it is a result, not a crash of the benchmark
            common.say(ok=False, encode=0.0, decode=0.0, error=0.0, reason=repr(error)[:200])
            continue
        norm = float((restored.double() - tensor.double()).norm() / tensor.double().norm())
        common.say(ok=True, encode=middle - start, decode=end - middle, error=norm)


if __name__ == "__main__":
    main()
