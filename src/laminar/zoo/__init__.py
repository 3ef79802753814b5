"""Builders of whole flows under the names the field knows them by.

Flows of vectors stand in `laminar.zoo.vectors`, those of images and sequences in
`laminar.zoo.images`, those on manifolds in `laminar.zoo.manifolds`; all can be had from here.
"""

from laminar.preset import Preset as Preset
from laminar.preset import preset as preset
from laminar.zoo.images import glow as glow
from laminar.zoo.images import tarflow as tarflow
from laminar.zoo.manifolds import rotations as rotations
from laminar.zoo.manifolds import sphere as sphere
from laminar.zoo.manifolds import torus as torus
from laminar.zoo.vectors import bnaf as bnaf
from laminar.zoo.vectors import cnf as cnf
from laminar.zoo.vectors import gaussianization as gaussianization
from laminar.zoo.vectors import iaf as iaf
from laminar.zoo.vectors import maf as maf
from laminar.zoo.vectors import naf as naf
from laminar.zoo.vectors import nice as nice
from laminar.zoo.vectors import nsf as nsf
from laminar.zoo.vectors import planar as planar
from laminar.zoo.vectors import radial as radial
from laminar.zoo.vectors import realnvp as realnvp
from laminar.zoo.vectors import residual as residual
from laminar.zoo.vectors import sylvester as sylvester
from laminar.zoo.vectors import triangular_spline as triangular_spline

BUILDERS = {
    "nsf": nsf,
    "maf": maf,
    "iaf": iaf,
    "realnvp": realnvp,
    "residual": residual,
    "gaussianization": gaussianization,
    "triangular_spline": triangular_spline,
    "nice": nice,
    "naf": naf,
    "bnaf": bnaf,
    "planar": planar,
    "radial": radial,
    "sylvester": sylvester,
}
"""Builders by name, as the command line knows them: it fits by maximum likelihood, so without
`cnf`."""
