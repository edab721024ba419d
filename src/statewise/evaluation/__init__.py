"""Skills with exact answers, and the scoring of a model on them."""

from statewise.evaluation.score import Report, SkillScore, evaluate
from statewise.evaluation.skills import DISTANCES, SKILLS, Instance, make

__all__ = ["DISTANCES", "SKILLS", "Instance", "Report", "SkillScore", "evaluate", "make"]
