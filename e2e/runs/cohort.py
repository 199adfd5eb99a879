"""From settings to the description of a cohort."""

from __future__ import annotations

from e2e.cohort.ids import IdRules
from e2e.cohort.spec import CohortSpec
from e2e.settings.schema import Data


def cohort_spec(data: Data, *, name: str = "") -> CohortSpec:
    """Return what is needed to load the cohort that the settings describe.

    Parameters
    ----------
    data
        The settings of the cohort.
    name
        Name of the cohort, for messages.

    Returns
    -------
    CohortSpec
        For :func:`e2e.cohort.load.load_cohort`.
    """
    return CohortSpec(
        name=name,
        labels=data.labels,
        slide_column=data.columns.slide,
        case_column=data.columns.case,
        split_column=data.columns.split,
        centre_column=data.columns.centre,
        split_names=data.splits,
        rules=id_rules(data),
        split_file=data.split_file,
        fold=data.fold,
        val_share=data.cut.val,
        test_share=data.cut.test,
        stores=tuple(data.stores),
        scales=tuple(map(tuple, data.scales)),
        features=tuple(data.features),
        coords=data.coords,
        verify=data.verify,
        unit="case" if data.unit == "case" else "slide",
        unmatched="drop" if data.unmatched == "drop" else "error",
        source=data.source,
        pack_options=data.pack,
    )


def id_rules(data: Data) -> IdRules:
    """Return how the ids in the cohort's tables are read and compared."""
    return IdRules(
        data.slide_suffix,
        data.slide_separator,
        file_name="file_name" in data.match,
        ignore_case="ignore_case" in data.match,
    )
