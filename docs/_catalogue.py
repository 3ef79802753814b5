"""The page `catalogue.md`: what laminar has, from its own names, beside other libraries.

    python docs/_catalogue.py

writes it. A test sees to it that the page is as written, that every name exists, and that every
transform of laminar has a row.
"""

from pathlib import Path

import laminar

PAGE = Path(__file__).parent / "catalogue.md"

LIBRARIES = {
    "f": ("FlowJAX", "19.1"),
    "z": ("zuko", "1.6"),
    "N": ("normflows", "1.7"),
    "n": ("nflows", "0.14"),
    "t": ("torchflows", "1.2"),
    "d": ("distrax", "0.1"),
    "i": ("FrEIA", "0.2"),
}

# What it is, laminar's names, and the letters of the libraries whose documentation shows it.
ROWS = {
    "Scalar maps": [
        ("Affine and additive", "Affine Shift", "fzNntdi"),
        ("Exponential, softplus, power", "Exp Softplus Power", "fzn"),
        ("Sigmoid, logit, tanh", "Sigmoid logit Tanh LeakyTanh", "fnd"),
        ("Sinh–arcsinh", "SinhArcsinh", ""),
        ("Rational-quadratic spline", "RationalQuadratic", "fzNntdi"),
        ("Circular rational-quadratic spline", "RationalQuadratic", "zN"),
        ("Linear spline", "Linear", "nti"),
        ("Mixture of logistics (Flow++)", "MixtureCDF", ""),
        ("Deep sigmoidal (NAF)", "DeepSigmoidal naf", "zt"),
        ("Unconstrained monotone (UMNN)", "UnconstrainedMonotone", "znt"),
        ("Sum-of-squares polynomial", "SumOfSquares", "z"),
        ("Bernstein polynomial", "Bernstein", "z"),
        ("Heavy tails", "TailTransform", ""),
        ("Quantiles of data", "QuantileMap", ""),
        ("Any monotone function, inverted numerically", "NumericalInverse", "f"),
    ],
    "Linear maps": [
        ("Triangular", "Triangular", "fd"),
        ("LU", "LU", "zNntd"),
        ("QR", "QR", "n"),
        ("SVD", "SVD", "n"),
        ("Householder reflections", "Householder", "fni"),
        ("Cayley", "Cayley", ""),
        ("Matrix exponential", "MatrixExponential", ""),
        ("Low rank", "LowRank", "d"),
        ("ActNorm", "ActNorm", "Nni"),
        ("Permutations", "Permute", "fzNni"),
    ],
    "Layers and architectures": [
        ("Coupling, any scalar map inside", "Coupling coupling", "fztd"),
        (
            "Masked autoregression, any scalar map inside",
            "MaskedAutoregressive masked_autoregressive",
            "fzt",
        ),
        ("NICE", "nice", "zNti"),
        ("RealNVP", "realnvp", "fzNntdi"),
        ("MAF", "maf", "fzNnt"),
        ("IAF", "iaf", "ft"),
        ("Neural spline flow", "nsf", "fzNnt"),
        ("Block neural autoregressive flow", "BlockAutoregressive bnaf", "f"),
        ("Planar", "Planar planar", "fNt"),
        ("Radial", "Radial radial", "Nt"),
        ("Sylvester", "Sylvester sylvester", "t"),
        ("Residual flow", "Residual residual LipschitzMLP", "Nti"),
        ("Gaussianization", "gaussianization", "z"),
        ("A map of its own for each column", "Stack", "f"),
        ("Parameters of any map from a network", "Amortized amortized", ""),
    ],
    "Continuous flows": [
        ("Neural ODE", "Continuous cnf VelocityField", "zt"),
        ("RNODE regularisation", "rnode", "t"),
        ("Flow matching", "flow_matching", ""),
    ],
    "Manifolds": [
        ("Möbius maps of the circle", "CircleMoebius", ""),
        ("Tori: coupling and autoregression of circular maps", "torus", "zN"),
        ("Spheres: recursive", "Cylindrical sphere", ""),
        ("Spheres: exponential maps", "ExponentialMap", ""),
        ("Spheres: Möbius and projective maps", "SphereMoebius Projective", ""),
        ("Simplex", "StickBreaking Softmax", ""),
        ("Rotations, SO(3)", "RotationCoupling QuaternionMap rotations", ""),
    ],
    "Images and sequences": [
        ("Squeeze", "Squeeze", "Nni"),
        ("Haar wavelet", "Haar", "i"),
        ("Invertible 1×1 convolution", "conv1x1 Positionwise", "Nnti"),
        ("Periodic convolution", "PeriodicConv", ""),
        ("Checkerboard and channel masks", "MaskedCoupling conv_coupling", "d"),
        ("Multiscale", "multiscale Leading", "Nnt"),
        ("Glow", "glow", "Nti"),
        ("Dequantisation, uniform and variational", "Dequantise", ""),
        (
            "Transformer autoregression over patches (TarFlow)",
            "TransformerAutoregressive tarflow",
            "",
        ),
    ],
    "Stochastic maps and surjections": [
        ("Langevin and Hamiltonian steps", "Langevin Hamiltonian Leapfrog", "N"),
        ("Augmented flows, slices", "Slice", "N"),
        ("Absolute value", "AbsoluteValue", ""),
        ("Sorting", "Sort Ordered", ""),
    ],
    "Conditions encoded by a network": [
        ("Sets, sequences, images", "SetEncoder SequenceEncoder ImageEncoder", ""),
    ],
    "Putting together": [
        ("Chains and inverses", "Chain Invert Identity", "fzNntdi"),
        ("Layers under a scan", "Repeat repeat", "f"),
        ("Slices of an event", "Independent Indexed Reshape", "fd"),
    ],
}

HEAD = """# The catalogue beside others

Every row is a bijection, a surjection or an architecture. The column of laminar is made from its
own names by `docs/_catalogue.py`; they are described under [bijections](bijections.md) and in the
[reference](api.md).

The other columns were filled in November 2026 from the public documentation of each library and
the list of its modules: ✓ where it shows the row, ? where we did not find it. A ? does not mean
that it is missing: it may be there under another name, or take few lines to write. The releases
of that time are {versions}.

Every bijection of laminar is tested by one [contract](check.md#a-bijection-of-your-own) in float32
and float64 and can be saved; those with parameters take a condition, themselves or through
`amortized`. Estimates, bounds and surjections have tests of their own, by statistics. No such
statement is made of the others.
"""


def cells(names: str) -> str:
    """Names of laminar as code; one that does not exist is an error."""
    for name in names.split():
        getattr(laminar, name)
    return ", ".join(f"`{name}`" for name in names.split())


def page() -> str:
    """The whole page."""
    versions = ", ".join(f"{name} {version}" for name, version in LIBRARIES.values())
    text = [HEAD.format(versions=versions)]
    titles = ["", "laminar", *(name for name, _ in LIBRARIES.values())]
    for section, rows in ROWS.items():
        text += [f"## {section}", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for what, names, found in rows:
            marks = ["✓" if letter in found else "?" for letter in LIBRARIES]
            text.append(f"| {' | '.join([what, cells(names), *marks])} |")
        text.append("")
    return "\n".join(text)


if __name__ == "__main__":
    PAGE.write_text(page())
