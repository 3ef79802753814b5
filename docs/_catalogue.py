"""The page `catalogue.md`: what laminar has, from its own names, beside other libraries.

    python docs/_catalogue.py

writes it. A test sees to it that the page is as written, that every name exists, and that every
transform of laminar has a row.
"""

import inspect
import re
from pathlib import Path

import laminar

PAGE = Path(__file__).parent / "catalogue.md"

LIBRARIES = {
    "f": ("FlowJAX", "19.1.2"),
    "z": ("zuko", "1.6.0"),
    "N": ("normflows", "1.7.3"),
    "n": ("nflows", "0.14"),
    "t": ("torchflows", "1.2.1"),
    "d": ("distrax", "0.1.9"),
    "i": ("FrEIA", "0.2"),
}

# What it is, laminar's names with the options that make it (none where it lacks it), and the
# letters of the libraries whose release has it.
ROWS = {
    "Scalar maps": [
        ("Affine and additive", "Affine Shift", "fzNntdi"),
        ("Exponential, softplus, power", "Exp Softplus Power", "fzd"),
        ("Sigmoid, logit, tanh", "Sigmoid logit Tanh LeakyTanh", "fzNndi"),
        ("Sinh–arcsinh", "SinhArcsinh", ""),
        ("Rational-quadratic spline", "RationalQuadratic", "fzNntd"),
        ("Circular rational-quadratic spline", 'RationalQuadratic(tails="circular")', "zNd"),
        ("Linear spline", "Linear", "nt"),
        ("Quadratic and cubic splines", "", "n"),
        ("Linear-rational spline", "", "t"),
        ("Mixture of logistics (Flow++)", 'MixtureCDF(law="logistic")', "t"),
        ("Mixture of normals, back through their quantiles", 'MixtureCDF(law="normal")', "z"),
        ("Deep sigmoidal (NAF)", "DeepSigmoidal naf", "zt"),
        ("Unconstrained monotone (UMNN)", "UnconstrainedMonotone", "zt"),
        ("Sum-of-squares polynomial", "SumOfSquares", "z"),
        ("Bernstein polynomial", "Bernstein", "z"),
        ("Heavy tails", "TailTransform", ""),
        ("Tanh with logarithmic tails", "LogTanh", "n"),
        ("Leaky ReLU", "LeakyReLU", "ni"),
        ("Softclip, signed power", "Softclip SignedPower", "z"),
        ("Sine, cosine", "", "z"),
        ("Distribution functions: Cauchy, Gumbel, a given one", "CDF", "znd"),
        ("Quantiles of data", "QuantileMap", ""),
        ("Any monotone function, inverted numerically", "NumericalInverse", "fz"),
        ("A function in JAX, inverted from its trace", "", "d"),
    ],
    "Linear maps": [
        ("Triangular", "Triangular", "ftd"),
        ("LU", "LU", "zNntd"),
        ("QR", "QR", "nt"),
        ("SVD", "SVD", "n"),
        ("Householder reflections", "Householder", "fnti"),
        ("Cayley", "Cayley", ""),
        ("Matrix exponential", "MatrixExponential", "z"),
        ("Low rank", "LowRank", "d"),
        ("Any square matrix, by its determinant", "Matrix", "Nndi"),
        ("Orthogonal matrix, projected while it trains", "", "i"),
        ("Discrete cosine transform", "DCT", "f"),
        ("ActNorm", "ActNorm", "Nnti"),
        ("Batch normalisation", "", "Nn"),
        ("Permutations", "Permute", "fzNnti"),
    ],
    "Layers and architectures": [
        ("Coupling, any scalar map inside", "Coupling coupling", "fztd"),
        (
            "Masked autoregression, any scalar map inside",
            "MaskedAutoregressive masked_autoregressive",
            "fzt",
        ),
        ("Along a given graph of the columns", "masked_autoregressive(graph=…)", "zt"),
        ("NICE", "nice", "fzNntdi"),
        ("RealNVP", "realnvp", "fzNntdi"),
        (
            "GIN: scales that keep the volume",
            "coupling(keep_volume=True) realnvp(keep_volume=True)",
            "i",
        ),
        ("MAF", "maf", "fzNnt"),
        ("IAF", "iaf", "fzNnt"),
        ("Neural spline flow", "nsf", "fzNntd"),
        ("Triangular spline flow", "triangular_spline", "f"),
        ("Block neural autoregressive flow", "BlockAutoregressive bnaf", "f"),
        ("Planar", "Planar planar", "fNt"),
        ("Radial", "Radial radial", "Nt"),
        ("Sylvester", "Sylvester sylvester", "t"),
        ("Residual flow", "Residual residual LipschitzMLP", "Nti"),
        ("Proximal residual flow", "", "t"),
        ("Gaussianization", "gaussianization", "z"),
        ("A map of its own kind for each column", "Stack", "fzi"),
        ("Affine maps from the condition alone", "amortized", "fzNti"),
        ("Parameters of any map from a network", "Amortized amortized", ""),
        ("Layers that become invertible by training (InvAuto)", "", "i"),
    ],
    "Continuous flows": [
        ("Neural ODE", "Continuous cnf VelocityField", "zt"),
        ("Neural ODE with a convolutional velocity", "VelocityField(kernel=3)", "t"),
        ("RNODE regularisation", "rnode", "t"),
        ("OT-Flow: a potential with a closed trace", "PotentialField", "t"),
        ("Flow matching", "flow_matching", ""),
    ],
    "Manifolds": [
        ("Turns of a circle: the shift of a Möbius map", "CircleMoebius", "zN"),
        ("Möbius maps of the circle", "CircleMoebius", ""),
        ("Tori: coupling and autoregression of circular maps", "torus", "zNd"),
        ("Spheres: recursive", "Cylindrical sphere", ""),
        ("Spheres: exponential maps", "ExponentialMap", ""),
        ("Spheres: Möbius and projective maps", "SphereMoebius Projective", ""),
        ("Simplex", "StickBreaking Softmax", "z"),
        ("Rotations, SO(3)", "RotationCoupling QuaternionMap rotations", ""),
        ("Covariance and correlation matrices", "", "z"),
    ],
    "Images and sequences": [
        ("Squeeze", "Squeeze", "Nnti"),
        ("Haar wavelet", "Haar", "i"),
        ("Invertible 1×1 convolution", "conv1x1 Positionwise", "Nnti"),
        ("Periodic convolution", "PeriodicConv", ""),
        ("Coupling by channels", "conv_coupling channel_mask", "Nntdi"),
        ("Coupling by a checkerboard", "MaskedCoupling checkerboard_mask", "Ntd"),
        ("Multiscale", "multiscale Leading", "Nnti"),
        ("Glow", "glow", "Nti"),
        ("Residual flow with convolutions", "LipschitzConv", "Nti"),
        ("Dequantisation, uniform", "Dequantise", "N"),
        ("Dequantisation, variational", "Dequantise(noise=…) dequantisation_noise", ""),
        (
            "Transformer autoregression over patches (TarFlow)",
            "TransformerAutoregressive tarflow",
            "",
        ),
    ],
    "Stochastic maps and surjections": [
        ("Langevin and Hamiltonian steps", "Langevin Hamiltonian Leapfrog", "N"),
        ("Metropolis–Hastings steps", "", "N"),
        ("Augmented flows, slices", "Slice", "N"),
        ("Absolute value", "AbsoluteValue", ""),
        ("Sorting", "Sort Ordered", "z"),
    ],
    "Conditions encoded by a network": [
        ("Any network, trained with the flow", "Flow(embed=…)", "fn"),
        ("Sets, sequences, images", "SetEncoder SequenceEncoder ImageEncoder", ""),
    ],
    "Putting together": [
        ("Chains and inverses", "Chain Invert Identity", "fzNntdi"),
        ("One map between another and its inverse", "Conjugate", "fn"),
        ("Layers under a scan", "Repeat repeat", "f"),
        ("Slices of an event", "Independent Indexed Reshape", "fzdi"),
        ("Graphs of layers with several inputs and outputs", "", "i"),
    ],
}

HEAD = """# The catalogue beside others

Every row is a bijection, a surjection or an architecture. The column of laminar is made from its
own names by `docs/_catalogue.py`, with the option that makes a variant where there is one; they are
described under [bijections](bijections.md) and in the [reference](api.md).

The other columns were read in November 2026 from the source code of these releases:
{versions}.

- ✓: the release has it, or a part of it, ready to use: as a class, a function or an option, or as
  one of its classes around another.
- –: we found nothing that does it. It may take few lines to write there. In the column of laminar
  – marks what only others have.

What a repository has beyond the release is not counted, such as splines in FrEIA and UMNN in
nflows. What zuko passes on from PyTorch is counted. distrax takes the bijectors of TensorFlow
Probability as its own; they would fill many of its rows, and are not counted. The maps of distrax
and the transforms of zuko are made from arrays, which a network of your own may give.

Every bijection of laminar is tested by one [contract](check.md#a-bijection-of-your-own) in float32
and float64 and can be saved; those with parameters take a condition, themselves or through
`amortized`. Estimates, bounds and surjections have tests of their own, by statistics. No such
statement is made of the others.
"""


def cells(names: str) -> str:
    """Names of laminar as code, – for none; one that does not exist is an error.

    A name may have options behind it, as in ``Flow(embed=…)``, which must exist too.
    """
    for name in names.split():
        thing = getattr(laminar, name.split("(")[0])
        for option in re.findall(r"(\w+)=", name):
            if option not in inspect.signature(thing).parameters:
                raise ValueError(f"{name}: there is no option {option}.")
    return ", ".join(f"`{name}`" for name in names.split()) or "–"


def page() -> str:
    """The whole page."""
    versions = ", ".join(f"{name} {version}" for name, version in LIBRARIES.values())
    text = [HEAD.format(versions=versions)]
    titles = ["", "laminar", *(name for name, _ in LIBRARIES.values())]
    for section, rows in ROWS.items():
        text += [f"## {section}", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for what, names, found in rows:
            marks = ["✓" if letter in found else "–" for letter in LIBRARIES]
            text.append(f"| {' | '.join([what, cells(names), *marks])} |")
        text.append("")
    return "\n".join(text)


if __name__ == "__main__":
    PAGE.write_text(page())
