"""Solvers from their names, as the command line and the integrations read them."""

import pytest

import fewstep as fs
from fewstep.catalog import solver_named, spelling

NAMES = {
    "milstein": fs.Milstein(),
    "euler_maruyama": fs.EulerMaruyama(),
    "sh_ark": fs.ShARK(),
    "UniPC(3)": fs.UniPC(3),
    "uni_pc:3": fs.UniPC(3),
    "unipc-3": fs.UniPC(3),
    "UniPC(order=3, corrector=False)": fs.UniPC(3, corrector=False),
    "DPM-Solver++(2M)": fs.DPMSolverPP(2, multistep=True),
    "dpm_solver_pp:3s": fs.DPMSolverPP(3, multistep=False),
    "IPNDM(4, variable)": fs.IPNDM(4, variable=True),
    "DEIS(3, rho)": fs.DEIS(3, "rho"),
    "SASolver(3, tau=0)": fs.SASolver(3, tau=0),
    "ddim:0.5": fs.DDIM(0.5),
}


@pytest.mark.parametrize("text", NAMES)
def test_names_with_options_give_configured_solvers(text):
    assert repr(solver_named(text)) == repr(NAMES[text])


def test_every_solver_is_found_by_its_names():
    for name, solver in fs.solvers().items():
        for text in (name, repr(solver), spelling(name)):
            assert repr(solver_named(text)) == repr(solver)


BAD = {
    "milsten": "Did you mean 'milstein'",
    "heuns": "expected one of 'align', 'ancestral'",
    "unipc(ordr=3)": "UniPC takes order=2",
    "milstein:3": "Milstein takes no options",
    "unipc:9": "order: got 9",
}


@pytest.mark.parametrize("text", BAD)
def test_unknown_names_and_options_are_rejected(text):
    with pytest.raises(fs.InputError) as error:
        solver_named(text, "base")
    assert BAD[text] in str(error.value)
