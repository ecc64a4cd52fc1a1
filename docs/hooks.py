"""What the site shows and the repository keeps elsewhere."""

from pathlib import Path

from mkdocs.structure.files import File

PICTURES = ("example.png",)


def on_files(files, config):
    """Add the pictures of benchmarks/results under their own names."""
    for name in PICTURES:
        source = Path(config.config_file_path).parent / "benchmarks" / "results" / name
        files.append(File.generated(config, name, abs_src_path=str(source)))
    return files
