"""
The knobs of all samplers and their rules: what they are called by, and what --help says of them.
"""
import common
import unmask
from configurator import help_lines, help_of_rules


def functions():
    """All functions whose keyword-only arguments are flags of a script that writes texts."""
    modules = [common.concept(name) for name in common.OBJECTIVES]
    return [unmask.unmask, *(f for m in modules for f in (m.Model.sample, *m.RULES.values()))]


def help():
    """The rules of unmask.py, then what the samplers of the objectives have of their own, as text."""
    lines = ['', help_of_rules("rules of unmask.py and their own knobs", unmask.RULES), "  all of them:",
             *help_lines(unmask.unmask, '      ')]
    for objective in common.OBJECTIVES:
        concept = common.concept(objective)
        rules = {name: rule for name, rule in concept.RULES.items() if rule not in unmask.RULES.values()}
        same = [name for name in common.OBJECTIVES
                if common.concept(name).Model.sample is concept.Model.sample]
        own = list(help_lines(concept.Model.sample)) if same[0] == objective else []
        lines += [f"\nknobs of objective={', '.join(same)}:", *own] if own else []
        lines += [help_of_rules(f"rules of objective={objective}", rules)] if rules else []
    return '\n'.join(lines)
