"""The reward model: an image and a class to the probability that an expert finds it plausible.

Importing this package registers the classes with transformers' `AutoConfig`, `AutoModel` and `AutoImageProcessor`.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from pathalign.reward.configuration_reward import RewardModelConfig
from pathalign.reward.encoders import load_encoder
from pathalign.reward.explanation import Explanation, explain
from pathalign.reward.image_processing_reward import RewardImageProcessor
from pathalign.reward.loading import load_reward_model
from pathalign.reward.modeling_reward import RewardModel, RewardModelOutput

AutoConfig.register(RewardModelConfig.model_type, RewardModelConfig)
AutoModel.register(RewardModelConfig, RewardModel)
AutoImageProcessor.register(RewardModelConfig, image_processor_classes={"pil": RewardImageProcessor})
# Saved folders carry their code, so that `trust_remote_code=True` loads them where pathalign is not installed.
RewardModelConfig.register_for_auto_class()
RewardModel.register_for_auto_class("AutoModel")
RewardImageProcessor.register_for_auto_class()

__all__ = [
    "Explanation",
    "RewardImageProcessor",
    "RewardModel",
    "RewardModelConfig",
    "RewardModelOutput",
    "explain",
    "load_encoder",
    "load_reward_model",
]
