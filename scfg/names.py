"""What is chosen by name, for those who need the names alone: free of torch."""

BACKENDS = ("auto", "torch", "triton")
METHODS = {"cfg": "CFG", "scfg": "S-CFG"}  # of drawing
SAMPLERS = {
    "ddim": "DDIM",
    "dpmpp_2m": "DPM-Solver++(2M)",
    "euler": "Euler",
    "euler_ancestral": "Euler ancestral",
}
NETWORKS = ("unet", "transformer")
