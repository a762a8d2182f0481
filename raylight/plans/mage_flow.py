"""Mage-Flow: the blocks of Qwen Image."""

from dataclasses import replace

from raylight.plans.qwen_image import PLANS as QWEN_IMAGE

PLANS = (replace(QWEN_IMAGE[0], model="comfy.ldm.mage_flow.model.MageFlowTransformer2DModel"),)
