"""What the site shows and the repository keeps elsewhere."""

from pathlib import Path

from mkdocs.structure.files import File

PICTURES = ("example.png", "evidence/evidence.png")


def on_files(files, config):
    """Add the pictures of benchmarks/results under their own names."""
    for picture in PICTURES:
        source = Path(config.config_file_path).parent / "benchmarks" / "results" / picture
        files.append(File.generated(config, source.name, abs_src_path=str(source)))
    return files
