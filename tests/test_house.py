"""The house: its size, which way imports point, and whether the documents say what is true."""
import ast
import importlib
import re

import pytest

import common
import configurator
from conftest import ROOT

GROUND = sorted(ROOT.glob('*.py'))
ROOMS = ('text', 'hub', 'parts', 'tools')
DOCS = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
OBJECTIVES = set(common.OBJECTIVES)
OTHERS = ('generate.py', 'graph_lib.py', 'dit.py', 'modeling_bd3lm.py', 'modeling_dit.py', 'transformer.py',
          'samplers/bd3lm.py', 'bd3lm.py', 'data/NAME/prepare.py')  # files of other repositories that we name
LOWER = {'configurator', 'model', 'unmask'}

# who may import whom, from above down; a name stands for a file of the ground floor or for a room
BELOW = {'configurator': set(), 'text': {'configurator'}, 'model': {'configurator', 'parts'},
         'unmask': {'configurator', 'parts'}, 'parts': {'configurator', 'model', 'text'},
         **{name: LOWER | OBJECTIVES - {name} | {'parts', 'text'} for name in OBJECTIVES}}
BELOW['common'] = {'configurator', 'parts', 'text', *LOWER, *OBJECTIVES}
BELOW['hub'] = {'common', 'configurator', 'model', 'parts', 'text'}
BELOW['tools'] = BELOW['hub'] | OBJECTIVES | {'hub', 'unmask'}
BELOW |= {script: BELOW['tools'] | {'tools'} for script in ('train', 'sample', 'eval')}


def imports(path):
    """The modules of ours that a file imports: ground-floor files, rooms as room.module."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            rooms = node.module in ROOMS
            names += [f'{node.module}.{alias.name}' for alias in node.names] if rooms else [node.module]
    own = {p.stem for p in GROUND} | set(ROOMS)
    return [name for name in names if name.split('.')[0] in own]


def modules():
    """{name: path} of all modules but the preparers and the tests."""
    return {path.stem: path for path in GROUND} | {f'{room}.{path.stem}': path for room in ROOMS
                                                   for path in (ROOT / room).glob('*.py')}


def test_the_ground_floor_is_a_table_of_contents():
    lines = {path.name: len(path.read_text().splitlines()) for path in GROUND}
    assert len(lines) <= 16 and max(lines.values()) <= 330 and sum(lines.values()) <= 3300, lines
    assert lines['masked.py'] <= 220 and lines['train.py'] <= 300 and lines['eval.py'] <= 330


def test_imports_point_down():
    for name, path in modules().items():
        room = name.split('.')[0]
        for other in imports(path):
            assert other.split('.')[0] in BELOW[room] | {room}, f"{name} imports {other}"


def test_there_is_no_circle_of_imports():
    known = modules()
    open_, done = [], set()

    def visit(name):
        assert name not in open_, ' -> '.join([*open_, name])
        if name in done or name not in known:
            return
        open_.append(name)
        for other in imports(known[name]):
            visit(other)
        done.add(open_.pop())
    for name in known:
        visit(name)


def test_the_scripts_ask_no_model_and_no_dataset_what_it_is():
    for name in ('train', 'sample', 'eval'):
        source = (ROOT / f'{name}.py').read_text()
        assert not re.search(r'hasattr|isinstance|objective\'?\]? [=!]= ', source), name


def test_lines_have_at_most_110_columns():
    for path in [*GROUND, *ROOT.glob('*/*.py'), *ROOT.glob('data/*/*.py')]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 110, f"{path.relative_to(ROOT)}:{number}"


# ---- the documents ----------------------------------------------------------------------------------------

def test_the_readme_has_at_most_170_lines():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 170


def anchors(path):
    """The places in a Markdown file that a link can name, as GitHub makes them."""
    titles = re.findall(r'^#+ (.+)$', re.sub(r'```.*?```', '', path.read_text(), flags=re.S), re.M)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


@pytest.mark.parametrize('path', DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r'\]\(([^)\s]+)\)', path.read_text()):
        if not target.startswith('http'):
            file, _, anchor = target.partition('#')
            there = (path.parent / file).resolve() if file else path
            assert there.exists() and (not anchor or anchor in anchors(there)), target


def programs():
    """{how a program is called: names of its knobs}."""
    import eval as evaluation
    import sample
    import train
    from hub import export
    from text import rows
    from tools import bench, frontier, latents, tasks
    own = [f for name in OBJECTIVES for f in (*common.concept(name).RULES.values(),
                                              common.concept(name).Model.sample)]
    configs = [common.concept(name).Config for name in OBJECTIVES]
    things = {'train.py': [train.Config, *configs, *(kind.Config for kind in rows.KINDS.values())],
              '-m hub.export': [export.Config], '-m tools.demo': [],
              '-m tools.bench': [bench.Config, *configs]}
    things |= {'sample.py': [sample.Config, *own], 'eval.py': [evaluation.Config, *own],
               '-m tools.frontier': [frontier.Config, *own], '-m tools.latents': [latents.Config, *own],
               '-m tools.tasks': [tasks.Config, *own]}
    import unmask
    things = {name: [*group, unmask.unmask] for name, group in things.items()}
    found = {name: {'help'} | {knob for thing in group for knob in configurator.knobs_of(thing)}
             for name, group in things.items()}
    for name in [path.parent.name for path in ROOT.glob('data/*/prepare.py')]:
        prepare = importlib.import_module(f'data.{name}.prepare').prepare
        found[f'data/{name}/prepare.py'] = {'help', 'out', *configurator.knobs_of(prepare)}
    return found


def test_the_commands_in_the_documents_name_scripts_configs_and_knobs_that_exist():
    known = programs()
    for path in DOCS:
        command = r'(?:python|torchrun(?: --\S+)+)(?: \\\n)? +((?:-m )?[\w./]+)((?: +[^\n`#|]+)?)'
        for program, rest in re.findall(command, path.read_text()):
            if program not in known:
                own = program.endswith('.py') or '.' in program
                assert '/NAME/' in program or not own, (path.name, program)
                continue
            for flag in re.findall(r'--(\w+)', rest):
                assert flag in known[program], (path.name, program, flag)
            for config in re.findall(r'config/\w+\.py', rest):
                assert (ROOT / config).exists(), (path.name, config)


def test_the_functions_that_docstrings_and_documents_name_are_there():
    """`masked.py` and its like, `hub/web.py`, in docstrings, comments and documents."""
    name = r'(?<![\w/.-])((?:text|hub|parts|tools|config|data|tests)/[\w/]+\.py|[a-z_]+\.py)\b'
    files = [*DOCS, *GROUND, *(p for room in ROOMS for p in (ROOT / room).glob('*.py'))]
    names = {p.name for p in ROOT.rglob('*.py') if '.venv' not in p.parts}
    for path in files:
        for found in re.findall(name, path.read_text()):
            there = (ROOT / found).exists() or '/' not in found and found in names
            assert there or found in OTHERS, f"{path.name}: {found}"
