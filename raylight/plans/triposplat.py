"""TripoSplat: latent tokens in the refiner, then latent, condition and camera tokens together. Position
embeddings are computed from the tokens, beside each block.
"""

from raylight.parallel.plan import Gather, SelfAttention, SequencePlan, Stream

PLANS = (
    SequencePlan(
        model="comfy.ldm.triposplat.model.LatentSeqMMFlowModel",
        inputs={
            "noise_repo_layers.*": {"hidden_states": Stream("noise")},
            "noise_refiner.*": {"x": Stream("noise")},
            "repo_layers.*": {"hidden_states": Stream("tokens")},
            "blocks.*": {"x": Stream("tokens")},
        },
        attention={"noise_refiner.*": SelfAttention(("noise",)), "blocks.*": SelfAttention(("tokens",))},
        outputs={"noise_refiner.-1": Gather("noise"), "blocks.-1": Gather("tokens")},
    ),
)
