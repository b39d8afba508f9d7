"""A teacher's answers to fixed text, computed once: `build` makes a cache, `TeacherCache` reads it, `CachedTeacher`
stands where a teacher would in a training step. Imports what `teachers` may."""

# ruff: noqa: F401 - the names imported here are what the room offers

from toolkit.teachers.cache.build import build, plan
from toolkit.teachers.cache.forms import Form
from toolkit.teachers.cache.store import CachedTeacher, TeacherCache, identity_of
