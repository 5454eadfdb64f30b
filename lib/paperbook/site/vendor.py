"""The JavaScript that the site serves itself: MathJax, require.js and the widgets' runtime, from npm.

A page that takes its scripts from somebody else's host stops working when that host does, and tells it who reads what.
The versions stand in `book/package.json`, their checksums in `book/package-lock.json` (without a registry's address, so
that npm's own setting decides where they come from). Of 150 MB of packages the site needs about 7.
"""

import hashlib
import shutil
import subprocess
from pathlib import Path

from paperbook.site.stage import write

# Package folders and the files of theirs that a page may load.
WANTED = {
    "mathjax": ("es5/tex-mml-chtml.js", "es5/input/tex/extensions/**/*.js", "es5/output/chtml/fonts/woff-v2/*.woff",
                "es5/a11y/*.js", "es5/sre/**/*"),
    "requirejs": ("require.js",),
    "@jupyter-widgets/html-manager": ("dist/embed-amd.js", "dist/*.woff", "dist/*.woff2", "dist/*.ttf", "dist/*.eot",
                                      "dist/*.svg"),
}  # fmt: skip
ASKED = ("package.json", "package-lock.json")
NPM = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")


def _pick(packages: Path, target: Path) -> int:
    """Copy the wanted files of every package; how many there were."""
    count = 0
    for package, patterns in WANTED.items():
        files = {f for pattern in patterns for f in (packages / package).glob(pattern) if f.is_file()}
        if not files:
            raise FileNotFoundError(f"the npm package {package} does not hold {patterns[0]}")
        for source in files:
            place = target / package / source.relative_to(packages / package)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place)
        count += len(files)
    return count


def fingerprint(root: Path) -> str:
    """Changes when other versions, or other files of them, are asked for."""
    asked = (root / "book" / name for name in ASKED)
    return hashlib.sha256(b"".join(path.read_bytes() for path in asked) + repr(WANTED).encode()).hexdigest()


def vendor(root: Path) -> Path | None:
    """The folder with the site's scripts, installed if the lock file changed; None where npm cannot provide them.

    None makes pages load the scripts from a CDN. That is said loudly, because such a site needs the network to be read.
    """
    build, key = root / "_build", fingerprint(root)
    target, stamp = build / "scripts" / "vendor", build / "vendor.stamp"
    if stamp.exists() and stamp.read_text() == key and target.is_dir():
        return target
    reason = "npm is not installed (on Debian: apt-get install npm)"
    if shutil.which("npm"):
        work = build / "npm"
        work.mkdir(parents=True, exist_ok=True)
        for name in ASKED:
            shutil.copy2(root / "book" / name, work)
        print("site: fetching MathJax and the widgets' scripts with npm, once …", flush=True)
        done = subprocess.run(NPM, cwd=work, capture_output=True, text=True)
        if done.returncode == 0:
            shutil.rmtree(target, ignore_errors=True)
            count = _pick(work / "node_modules", target)
            shutil.rmtree(work, ignore_errors=True)
            write(stamp, key)
            print(f"site: {count} files of {len(WANTED)} packages will be served by the site itself", flush=True)
            return target
        reason = "npm could not install them: " + (done.stderr.strip().splitlines() or ["no message"])[-1]
    print(
        "\n  *** The pages of this build load MathJax and the widgets from a CDN. ***\n"
        f"  *** {reason}\n"
        "  *** Until that is mended the site needs the network, and `check` reports its third-party references. ***\n",
        flush=True,
    )
    return None
