"""What the site shows and the repository keeps elsewhere."""

from pathlib import Path

from mkdocs.structure.files import File

RESULTS = "benchmarks/results"
PICTURES = {
    "example.png": "example.png",
    f"{RESULTS}/evidence/evidence.png": "evidence/evidence.png",  # as the page links to it on disk
}


def on_files(files, config):
    """Add the pictures of benchmarks/results under their own names."""
    for name, result in PICTURES.items():
        source = Path(config.config_file_path).parent / RESULTS / result
        files.append(File.generated(config, name, abs_src_path=str(source)))
    return files
