"""Build the site: python -m tpo_course.site OUT."""

from tpo_course.site.build import main

main()
