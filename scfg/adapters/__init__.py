"""Ways to use S-CFG inside other programs; each module here imports its host when it is imported.

`scfg.adapters.diffusers`, `scfg.adapters.modular`, `scfg.adapters.k_diffusion`,
`scfg.adapters.comfyui`, `scfg.adapters.checkpoints`. They share one recording
(`scfg.recording.recorder`), one combination (`scfg.guidance`) and one reckoning of steps
(`scfg.recording.run`); none of them keeps state outside the objects it returns.
"""
