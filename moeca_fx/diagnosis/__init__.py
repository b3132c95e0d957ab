"""`moeca_fx.doctor`: every stage of `transform` with its time, where it stopped, the evidence, and what to do."""

from moeca_fx.diagnosis.doctor import doctor
from moeca_fx.diagnosis.evidence import CandidateReport
from moeca_fx.diagnosis.report import DoctorReport, Stage

__all__ = ["CandidateReport", "DoctorReport", "Stage", "doctor"]
