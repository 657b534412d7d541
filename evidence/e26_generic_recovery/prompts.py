"""Generic instructions as chat messages: 60 topics in 20 forms, of which held-out ones have topics of their own.

python -m evidence.e26_generic_recovery.prompts --output data/generic      # writes train.jsonl, tune.jsonl and test.jsonl
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from evidence.prompt_files import write_files
from oprd.files import write_text

TOPICS = (
    "bicycles", "volcanoes", "the printing press", "honey bees", "the water cycle", "chess", "coffee", "the Roman Empire", "electric cars",
    "sleep", "jazz music", "the moon", "bread baking", "antibiotics", "whales", "the stock market", "earthquakes", "football", "libraries",
    "solar panels", "the human heart", "deserts", "poetry", "the internet", "vaccines", "gardening", "the French Revolution", "penguins",
    "photography", "rainbows", "supply and demand", "the Amazon rainforest", "trains", "memory", "cheese", "comets", "the guitar",
    "recycling", "dinosaurs", "job interviews", "the ocean", "telescopes", "chocolate", "mountains", "the alphabet", "robots", "tides",
    "public speaking", "spiders", "bridges", "tea", "winter", "maps", "clocks", "the Great Wall of China", "swimming", "friendship",
    "airplanes", "salt", "languages",
)  # fmt: skip
FORMS = (
    "Explain {} to a child.", "What is interesting about {}?", "Write a short poem about {}.", "List three facts about {}.",
    "Give me a quiz question about {}, with its answer.", "What makes {} important? Answer in two sentences.", "Write the first paragraph of a story about {}.",
    "Describe {} to a visitor from another planet.", "What do people often get wrong about {}?", "Compare {} with something similar.",
    "Write an email to a friend about {}.", "What should a beginner know about {}?", "Write a headline for a newspaper article about {}.",
    "What is the history of {} in short?", "Give two arguments for spending more money on {}, and one against.", "Write a dialogue about {}.",
    "Which words come to mind when you think of {}?", "What has changed about {} over the years?", "Write a plan for a lesson about {}.",
    "What would the world be like without {}?",
)  # fmt: skip
TOPICS_OF = {"train": 48, "tune": 6, "test": 6}
"""File → topics in it; each has all forms."""


def write(folder: Path) -> None:
    """Write the three files, each in random order; no topic is in two of them."""
    generator = random.Random(0)
    topics = generator.sample(TOPICS, len(TOPICS))
    for name, count in TOPICS_OF.items():
        own, topics = topics[:count], topics[count:]
        texts = [form.format(topic) for topic in own for form in FORMS]
        generator.shuffle(texts)
        lines = [json.dumps({"prompt": [{"role": "user", "content": text}]}) for text in texts]
        write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")


if __name__ == "__main__":
    write_files(write, __doc__, "data/generic")
