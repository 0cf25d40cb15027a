"""Settings and tensors of stored segdiff runs that have other names or values today, for resuming and loading them."""

from __future__ import annotations

from factorkit.engine.config import register_renamed_settings

# Settings of stored runs that have changed since: old name -> name of today; (name of today, old value) -> new value.
_STORED_AS = ("segdiff", "choose_regions", "places", "supervised")
register_renamed_settings(
    _STORED_AS,
    names={
        "width": "model_channels",
        "multipliers": "channel_mult",
        "blocks": "num_res_blocks",
        "attention": "attention_resolutions",
        "heads": "num_heads",
        "groups": "norm_groups",
        "mirror": "random_flip",
        "tail": "high_noise_fraction",
        "fit": "num_fit_images",
        "seeds": "seed_trials",
    },
    values={("masks", "competition"): "mixture", ("latent", None): "no"},
    added={"masks": "network", "backbone": "unet", "latent": "no", "latent_channels": 0, "latent_factor": 1},
    unread={"cue_weight": ("masks", "auto")},
    tensors={
        "mask_generator": "masks.decoder",
        "logit_norm": "masks.norm",
        "competition.place": "masks.prior_logits",
        "place": "prior_logits",
    },
)
