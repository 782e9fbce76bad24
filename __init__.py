"""Step3-VL for transformers. Importing the package registers its classes with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_step3 import Step3TextConfig, Step3VisionEncoderConfig, Step3VLConfig
from .generation_step3 import Step3BoundedCache
from .modeling_step3 import (
    Step3TextForCausalLM,
    Step3TextModel,
    Step3VisionModel,
    Step3VLForConditionalGeneration,
    Step3VLModel,
    Step3VLPreTrainedModel,
)
from .processing_step3 import Step3VLImageProcessor, Step3VLProcessor


for config_class in (Step3VisionEncoderConfig, Step3TextConfig, Step3VLConfig):
    AutoConfig.register(config_class.model_type, config_class)
AutoModel.register(Step3VisionEncoderConfig, Step3VisionModel)
AutoModel.register(Step3TextConfig, Step3TextModel)
AutoModel.register(Step3VLConfig, Step3VLModel)
AutoModelForCausalLM.register(Step3TextConfig, Step3TextForCausalLM)
for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(Step3VLConfig, Step3VLForConditionalGeneration)
AutoImageProcessor.register(Step3VLConfig, image_processor_classes={"pil": Step3VLImageProcessor})
AutoProcessor.register(Step3VLConfig, Step3VLProcessor)


__all__ = [
    "Step3BoundedCache",
    "Step3TextConfig",
    "Step3TextForCausalLM",
    "Step3TextModel",
    "Step3VLConfig",
    "Step3VLForConditionalGeneration",
    "Step3VLImageProcessor",
    "Step3VLModel",
    "Step3VLPreTrainedModel",
    "Step3VLProcessor",
    "Step3VisionEncoderConfig",
    "Step3VisionModel",
]
