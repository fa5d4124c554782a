"""What an entry of a class shows: its documented methods, in the order of its file.

Fields stand in the list of their class, not in entries of their own. What a private
base documents is shown where no public class does.
"""

import griffe


class Methods(griffe.Extension):
    def on_class_members(self, *, node, cls, agent, **kwargs):
        members = {name: cls.members.get(name) for name in vars(node.obj)}
        cls.members = {n: member for n, member in members.items() if is_method(member)}
        if cls.name.startswith("Abstract"):
            cls.members.pop("__init__", None)
        elif "__init__" in cls.members:
            hide_private(cls.members["__init__"].parameters)

    def on_package(self, *, pkg, loader, **kwargs):
        public = dict(classes(pkg))
        for cls in sorted(public.values(), key=lambda cls: len(cls.mro())):
            theirs = [public.get(base.path) for base in cls.mro()]
            declared = {name for base in theirs if base for name in base.members}
            for base in cls.mro():
                if base.path not in public:
                    inherit(cls, base, declared)


def is_method(member) -> bool:
    if member is None or member.is_alias:
        return False
    return member.is_function or "property" in member.labels


def hide_private(parameters):
    for name in [p.name for p in parameters if p.name.startswith("_")]:
        del parameters[name]


def classes(module):
    """The public classes of a package, with their paths."""
    for name, member in module.members.items():
        if name.startswith("_"):
            continue
        if not member.is_alias:
            yield from classes(member) if member.is_module else found(member)
        elif member.target_path.startswith(module.package.name + "."):
            yield from found(member.final_target)


def found(member):
    return [(member.path, member)] if member.is_class else []


def inherit(cls, base, declared):
    """Methods, or their words, that a private base documents."""
    for name, member in base.members.items():
        hidden = name.startswith("_") and name != "__call__"
        if hidden or name in declared or not member.has_docstring:
            continue
        if name not in cls.members:
            cls.members[name] = griffe.Alias(name, member, parent=cls)
        elif not cls.members[name].has_docstring:
            cls.members[name].docstring = member.docstring
