"""`tiny@1`: a captioner and an open-vocabulary phrase grounder from small pretrained networks that pip installs.

A scene is what the networks see in an image: DeepLabV3's map of 20 things, and EfficientNet-Lite0's 1000 classes at
every place at three scales. Candidate boxes are DeepLab's components, parts of one colour, and, for each phrase, the
boxes that hold most evidence for it, shrunk to an outline by colour; every candidate is cropped and classified. A
phrase is compared with the classes by their texts (MiniLM), after ConSE (Norouzi et al., "Zero-Shot Learning by Convex
Combination of Semantic Embeddings", 2014, section 3), as a sum over classes of probability times similarity.

The captioner is a template over the same scene, not a neural captioner, and grounding what it wrote is partly circular:
the same networks saw the same things. Scores are in 0..1 and comparable between images. Recommended in a recipe:
`score_floor` FLOOR and a `select` threshold of SELECT; within a phrase, boxes overlap little as they come.
"""

from .captioner import open_captioner
from .grounder import open_grounder

__all__ = ["FLOOR", "SELECT", "open_captioner", "open_grounder"]

FLOOR, SELECT = 0.05, 0.2
