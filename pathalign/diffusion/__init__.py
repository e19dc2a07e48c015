"""The diffusion model: its pipeline, its conditions and its adapters."""
