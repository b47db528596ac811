def template_in(folder):
    return ''
