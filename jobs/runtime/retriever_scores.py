"""The scores of evaluate.py that a trained retriever gives: settings and results."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Any

from jobs.runtime.scores_place import DEFAULT_DATASET, find_scores_place
from mmcore.data.prepared import read_split
from mmcore.data.references import prepared_references
from mmcore.errors import InputError

# BLIP and BLIP-2 re-rank so many answers on Flickr30k.
_NUM_RERANKED = 128


@dataclass(frozen=True)
class RetrievalScoreSettings:
    """How high the right text stands among all texts of a split, and the right image among all images.

    Recall at 1, 5 and 10 in percent, and the median rank, in both directions.
    """

    run: str
    """The finished run of a retriever, STORAGE/runs/clip/NAME or STORAGE/runs/qformer/NAME. The result is also written
    to STORAGE/scores/RECIPE/, in a file that names the run, the dataset and the split."""
    storage: str
    """Folder or s3://bucket/prefix that holds data/{dataset}."""
    dataset: str = DEFAULT_DATASET
    """Prepared dataset in --storage."""
    split: str = "split_karpathy:test"
    """COLUMN:NAME, the images and their captions."""
    captions_per_image: int = 5
    """Captions of each image, the first ones."""
    rerank: int | None = None
    """So many answers of each image and text, the best by ITC, are ordered again by ITM. 0 orders by ITC alone. A
    Q-Former alone has ITM; its default is 128."""
    encoder: str | None = None
    """Folder or name of the frozen image encoder, if it is not where the run had it."""
    batch_size: int = 64
    """Images or texts whose features are computed at once."""

    def check(self) -> None:
        """Raise InputError for a field that is out of its range."""
        for name, least in (("captions_per_image", 1), ("rerank", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def evaluate_retrieval(settings: RetrievalScoreSettings) -> dict[str, Any]:
    """Score the retriever on one split, and write the result beside the run. Returns plain JSON values.

    Raises InputError for a run of another kind, a dataset that is not prepared, or a split without images.
    """
    # torch is imported here, as it takes seconds and the scores of captions need none of it.
    from jobs.runtime.retrieval import score_retrieval
    from mmcore.trained.retriever import open_retriever

    settings.check()
    retriever = open_retriever(settings.run, encoder=settings.encoder)
    if settings.rerank and not retriever.reads_pairs:
        raise InputError(
            f"--rerank {settings.rerank}: {settings.run} compares features alone and has no ITM; leave the flag out"
        )
    rerank = settings.rerank
    if rerank is None:
        rerank = _NUM_RERANKED if retriever.reads_pairs else 0
    place, file_name = find_scores_place(settings.run)
    column, name, image_ids = read_split(settings.split, settings.storage, settings.dataset)
    references = prepared_references(settings.storage, settings.dataset).captions
    captions = {image_id: references[image_id][: settings.captions_per_image] for image_id in image_ids}
    if without := [image_id for image_id, texts in captions.items() if not texts]:
        raise InputError(
            f"--split {settings.split}: {len(without)} of its {len(image_ids)} images have no captions, such as "
            f"{without[0]!r}; name a split whose images all have some"
        )
    scores = score_retrieval(retriever, settings.storage, settings.dataset, captions, settings.batch_size, rerank)
    result = {**scores, **retriever.identity()}
    result |= {"settings": dataclasses.asdict(settings)}
    again = f"-rerank{rerank}" if rerank else ""
    scores_name = f"{file_name.removesuffix('.json')}-{settings.dataset}-{column}-{name}{again}.json"
    place.write(scores_name, (json.dumps(result, indent=2) + "\n").encode())
    print(f"scores written to {place.uri}/{scores_name}", file=sys.stderr)
    return result
