"""The pages of the admin, which only the admin's server shows."""

from django.contrib import admin
from django.urls import path

urlpatterns = [path("", admin.site.urls)]


def choose_urls(get_response):
    """A middleware: a request to the admin's server finds the admin's pages, and no others."""

    def middleware(request):
        if "shop.admin" in request.META:
            request.urlconf = "admin_urls"
        return get_response(request)

    return middleware
