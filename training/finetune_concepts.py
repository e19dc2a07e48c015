"""Split classes by subtype marks: new class embeddings, trained with LoRA adapters.

    accelerate launch training/finetune_concepts.py --config training/configs/smoke/finetune_concepts.yaml

Needs a class-conditional pipeline, a reward model, and marks: a feedback dataset with subtypes, or real images with an
expert attribute.
Hardware: two CPU cores for 32x32 pixels; a GPU for more.
Writes pytorch_lora_weights.safetensors in diffusers' format, with the new classes in it; time and memory are in
training/README.md. `--key value` overrides the file, `--help` lists the keys.
"""

from pathalign.config import parse_config
from pathalign.settings.concepts import ConceptsConfig
from pathalign.trainers.concepts import align


def main() -> None:
    config, output_dir = parse_config(ConceptsConfig, "runs/adapter")
    align(config, output_dir)


if __name__ == "__main__":
    main()
