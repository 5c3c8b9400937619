"""CLOC: contrastive language-image pre-training with promptable regions (Chen et al., arXiv 2410.02746).

The trainer meets the pipeline in the shard format alone. One image through the code, top to bottom: `data` (shard to
batch), `model` (towers and Prompter), `losses`, `train` (the loop), `evaluate`; `scenes` draws a world to try it on.
"""
