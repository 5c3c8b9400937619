"""CLOC: contrastive language-image pre-training with promptable regions (Chen et al., arXiv 2410.02746).

The trainer meets the pipeline in the shard format alone. One image through the code, top to bottom: `shards` and
`loader` (tar to sample), `data` (sample to batch), `model` and `prompter` (batch to features), `objective` and `losses`
(features to loss), `gradients` and `train` (the loop). Around them: `options` (every number), `checkpoint`, `journal`,
`text` (tokenizers), `encoder` (the finished model), `sets`, `metrics` and `evaluate`; `scenes` draws a world to try it
on.
"""
