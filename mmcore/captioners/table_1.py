"""Why the sizes of Table 1 of the report cannot all be met. `python -m mmcore.catalogue sizes` counts them.

Which parts give the report's numbers is our arithmetic. The report does not say it.
"""

RESNET = (
    "Table 1's 21.5 M does not follow from the published settings: six layers of width 512 with FFN 2048 have 25.2 M "
    "(FFN 1024 would give 21.6 M), embeddings and output layer of 2,366 words 2.4 M. The settings win here. Table 1's "
    "total leaves 12.7 M for ResNet-18, whose convolutions have 11.2 M."
)
CLIP = (
    "Table 1 gives this row a width of 768 and the 21.5 M of row 1. A decoder of width 768 has 47 M in its six layers "
    "alone, so the width here is row 1's 512. The frozen encoder has 87.5 M."
)
QFORMER = (
    "Table 1's 110 M is a BERT (109.5 M with its language head), which has no cross-attention to read an image with. "
    "Built is BLIP-2's Q-Former: six cross-attentions add 20.1 M, the queries' feed-forward layers 56.7 M. Table 1's "
    "total leaves 1,011 M for ViT-g, which are its 40 layers. BLIP-2 reads 39 of them, 986.0 M."
)
LANGUAGE_MODEL = (
    "Table 1's 188.3 M is the Q-Former as BLIP-2 publishes it, with its text half and its heads, and one Linear. The "
    "total includes them too. But no caption passes through these 81.5 M, so the model leaves them out, and training "
    "moves the other 106.7 M."
)
